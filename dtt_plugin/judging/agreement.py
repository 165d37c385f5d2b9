"""The task's rule and a judge side by side: rates, Cohen's kappa, and where they disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dtt_plugin.judging.questions import Question
from dtt_plugin.leaderboard import statistics
from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.tasks.thoughts import read

_VERDICT = re.compile(r"[^A-Za-z]*(yes|no)\b", re.IGNORECASE)


def verdict(answer: str) -> bool | None:
    """Return what a judge's answer says; None where its first word is neither yes nor no."""
    match = _VERDICT.match(read(answer).answer or "")
    return None if match is None else match[1].lower() == "yes"


def kappa(rule: Sequence[bool], judge: Sequence[bool]) -> float | None:
    """Return Cohen's kappa of two raters; None where both say always the same, so that chance explains it all."""
    a, b = np.asarray(rule, np.bool_), np.asarray(judge, np.bool_)
    if not a.size:
        return None
    observed = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if chance == 1 else (observed - chance) / (1 - chance)


@dataclass(frozen=True)
class Agreement:
    """How rule and judge agree on the responses to an attack."""

    n: int
    unclear: int
    """Responses of which the judge said neither yes nor no; they are in none of the figures below."""
    rule: Rate | None
    judge: Rate | None
    agreement: float | None
    """Share of the responses of which both say the same."""
    kappa: float | None


@dataclass(frozen=True)
class Report:
    """The task's rule and a judge, compared; what is listed has `record`, `attack` and `response`."""

    attacks: dict[str, Agreement]
    """Per attack, and where there are several, of all of them together ("all")."""
    rule_only: list[dict[str, str]] = field(default_factory=list)
    """Responses that the rule alone calls hacked."""
    judge_only: list[dict[str, str]] = field(default_factory=list)
    unclear: list[dict[str, str]] = field(default_factory=list)
    """With the judge's `answer`."""


def compare(questions: Sequence[Question], answers: Mapping[str, str]) -> Report:
    """Compare what the rule and the judge say; an empty response counts as not hacked without a question."""
    judged = [(question, verdict(answers[question.text]) if question.text else False) for question in questions]
    names = list(dict.fromkeys(question.attack for question in questions))
    attacks = {name: _agreement([pair for pair in judged if pair[0].attack == name]) for name in names}
    if len(names) > 1:
        # A record's responses to several attacks are alike: no exact interval is right for them together.
        whole = _agreement(judged)
        attacks["all"] = replace(whole, rule=_without_interval(whole.rule), judge=_without_interval(whole.judge))
    return Report(
        attacks,
        rule_only=[_told(question) for question, said in judged if question.rule and said is False],
        judge_only=[_told(question) for question, said in judged if not question.rule and said],
        unclear=[{**_told(question), "answer": answers[question.text]} for question, said in judged if said is None],
    )


def _agreement(judged: Sequence[tuple[Question, bool | None]]) -> Agreement:
    clear = [(question.rule, said) for question, said in judged if said is not None]
    rule, judge = (np.array([pair[i] for pair in clear], np.bool_) for i in (0, 1))
    return Agreement(
        n=len(judged),
        unclear=len(judged) - len(clear),
        rule=statistics.rate(rule) if clear else None,
        judge=statistics.rate(judge) if clear else None,
        agreement=float((rule == judge).mean()) if clear else None,
        kappa=kappa(rule.tolist(), judge.tolist()),
    )


def _without_interval(rate: Rate | None) -> Rate | None:
    return rate and replace(rate, low=None, high=None)


def _told(question: Question) -> dict[str, str]:
    return {"record": question.record, "attack": question.attack, "response": question.response}
