"""What runs are called beside each other: brief, no two the same, and never by a path of this machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dtt_plugin.files.digests import sha256_bytes
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.public_names import is_hub_model, public_name, public_text

_LONGEST_SHOWN = 40


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Give each run the shortest label that tells it from the others, and the title of its table."""
    models, facts = told_apart(run.model for run in runs), _facts_that_differ(runs)
    details = [[models[run.model], run.task, run.prompt_format, *own] for run, own in zip(runs, facts, strict=True)]
    told = [len({run[place] for run in details}) > 1 for place in range(3)]
    labels = []
    for run, parts in zip(runs, details, strict=True):
        kept = [part for place, part in enumerate(parts) if place >= len(told) or told[place]]
        labels.append(" · ".join([run.arm, *kept]))
    totals, seen = Counter(labels), Counter[str]()
    unique = []
    for label, run, parts in zip(labels, runs, details, strict=True):
        seen[label] += 1
        label = label if totals[label] == 1 else f"{label} #{seen[label]}"
        unique.append(replace(run, label=label, title=" · ".join(parts)))
    return unique


def _facts_that_differ(runs: Sequence[Run]) -> list[list[str]]:
    """Return for each run its facts that not all runs of its model, task and format share, such as `peft: none`."""
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.model, run.task, run.prompt_format), []).append(run)
    told: dict[int, list[str]] = {id(run): [] for run in runs}
    for members in alike.values():
        for name in sorted({name for run in members for name in run.identity.facts}):
            known = [run for run in members if name not in run.identity.unknown]
            shown = told_apart(run.identity.facts.get(name, "") for run in known)
            if len(shown) > 1:
                for run in known:
                    told[id(run)].append(f"{name}: {shown[run.identity.facts.get(name, '')] or 'none'}")
    return [told[id(run)] for run in runs]


def told_apart(names: Iterable[str]) -> dict[str, str]:
    """Return a brief form of each name, no two the same: of a path the last part, of a long text the beginning.

    Where two would be the same, a hub id is given in full, and anything else gets a digest; no path is ever shown.
    """
    brief = {name: _brief(name) for name in names}
    taken = Counter(brief.values())
    return {
        name: text if taken[text] == 1 else name if is_hub_model(name) else f"{text} ({_digest(name)})"
        for name, text in brief.items()
    }


def public_facts(facts: Mapping[str, str]) -> dict[str, str]:
    """Return facts of a run without paths: of each the last part, with a digest that tells two of one name apart."""
    shown = {name: public_text(value) for name, value in facts.items()}
    return {name: text if text == facts[name] else f"{text} ({_digest(facts[name])})" for name, text in shown.items()}


def _brief(name: str) -> str:
    if re.fullmatch(r"[0-9a-f]{16,}", name):
        return name[:8]
    if "/" in name and not re.search(r"[\[{<]|://", name):
        public = public_name(name)
        return public.rsplit("/", 1)[-1]
    return name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}…"


def _digest(name: str) -> str:
    return sha256_bytes(name.encode("utf-8", "replace"))[:6]
