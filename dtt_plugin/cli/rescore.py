"""`dtt rescore`: another rule for saved responses, without a model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, aligned, show

_SHOWN = 10
"""Disagreements in the terminal; --json has all."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rescore` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "rescore",
        help="apply another rule to saved responses",
        description="Count hacked responses or refusals in saved samples by another rule, without a model. Without"
        " SAMPLES: the rules, and the refusal rules' sensitivity and specificity on hand-labelled answers. With"
        " --judge: a language model is asked about each response to an attack, and its opinion is compared with the"
        " task's rule. A key for its server is read from DTT_JUDGE_API_KEY.",
    )
    parser.add_argument("samples", metavar="SAMPLES", type=Path, nargs="?", help="samples file or output folder")
    parser.add_argument("--rule", action="append", metavar="NAME", help="may be given again (default: every rule)")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Rescore, or show the rules."""
    from dtt_plugin.leaderboard import rules
    from dtt_plugin.leaderboard.lm_eval_files import read_run
    from dtt_plugin.leaderboard.sheets import plain
    from dtt_plugin.leaderboard.wording import rate_text
    from dtt_plugin.tasks.metrics import REFUSAL

    if args.judge or args.judge_model:
        return _judge(args)
    if args.samples is None:
        chosen = {name: rules.rule_named(name) for name in args.rule or rules.RULES}
        quality = {name: figures for name, figures in rules.quality().items() if name in chosen}
        if args.json:
            known = {name: {"kind": rule.kind, "says": rule.says} for name, rule in chosen.items()}
            found = {name: asdict(figures) for name, figures in quality.items()}
            show({name: {**known[name], **found.get(name, {})} for name in known}, as_json=True)
            return 0
        rows = []
        for name, rule in chosen.items():
            right = quality.get(name)
            both = (right.sensitivity, right.specificity) if right else (None, None)
            rows.append([name, rule.kind, *map(rate_text, both)])
        print(aligned(["rule", "of", "sensitivity", "specificity"], rows))
        for name, rule in chosen.items():
            print(f"{name}: {rule.says}")
        return 0
    measured = read_run(args.samples, unscored=True)
    kinds = {REFUSAL if name == REFUSAL else rules.ASR for name in measured.outcomes}
    usable = rules.OWN if measured.early_decision else rules.RULES
    fitting = [name for name in usable if rules.RULES[name].kind in kinds]
    report = rules.rescore(measured, args.rule or fitting)
    if args.json:
        by_rule = {rule: {name: asdict(row) for name, row in rows.items()} for rule, rows in report.items()}
        told = {"samples": str(measured.samples), "unfinished": measured.unfinished, "rules": by_rule}
        show(told, as_json=True)
        return 0
    rows = [
        [
            rule,
            plain(name),
            rate_text(row.before),
            rate_text(row.after),
            f"+{row.gained} -{row.lost}" if row.before else "-",
        ]
        for rule, outcomes in report.items()
        for name, row in outcomes.items()
    ]
    print(aligned(["rule", "of", "as logged", "by the rule", "changed"], rows))
    for note in measured.notes:
        print(note)
    return 0


def _judge(args: argparse.Namespace) -> int:
    from dtt_plugin.errors import DttError
    from dtt_plugin.judging.agreement import compare
    from dtt_plugin.judging.client import Judge
    from dtt_plugin.judging.questions import read_questions, unanswered
    from dtt_plugin.leaderboard.sheets import plain
    from dtt_plugin.leaderboard.wording import percent, rate_text

    if not (args.samples and args.judge and args.judge_model) or args.rule:
        raise DttError(
            "A judge needs SAMPLES, --judge URL and --judge-model NAME, and no --rule; the rule is the task's."
        )
    questions = read_questions(args.samples)
    report = compare(questions, Judge(args.judge, args.judge_model).answers(unanswered(questions)))
    if args.json:
        show({"samples": str(args.samples), "judge_model": args.judge_model, **asdict(report)}, as_json=True)
        return 0
    rows = [
        [
            plain(name),
            str(row.n),
            rate_text(row.rule),
            rate_text(row.judge),
            "-" if row.agreement is None else percent(row.agreement),
            "-" if row.kappa is None else f"{round(row.kappa, 2) + 0.0:.2f}",
            str(row.unclear),
        ]
        for name, row in report.attacks.items()
    ]
    print(aligned(["attack", "n", "rule", "judge", "agreement %", "kappa", "unclear"], rows))
    for title, found in (("rule", report.rule_only), ("judge", report.judge_only)):
        print(f"hacked by the {title} only: {len(found)}" + (f", the first {_SHOWN}" if len(found) > _SHOWN else ""))
        for item in found[:_SHOWN]:
            print(f"  {plain(item['record'])} {plain(item['attack'])}: {plain(item['response'])[:100]}")
    return 0
