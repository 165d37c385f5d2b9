"""`dtt rescore`: another rule for saved responses, without a model."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, aligned, show


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rescore` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "rescore",
        help="apply another rule to saved responses",
        description="Count hacked responses or refusals in saved samples by another rule, without a model. Without"
        " SAMPLES: the rules, and the refusal rules' sensitivity and specificity on hand-labelled answers.",
    )
    parser.add_argument("samples", metavar="SAMPLES", type=Path, nargs="?", help="samples file or output folder")
    parser.add_argument("--rule", action="append", metavar="NAME", help="may be given again (default: every rule)")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Rescore, or show the rules."""
    from dtt_plugin.leaderboard import rules
    from dtt_plugin.leaderboard.lm_eval_files import read_run
    from dtt_plugin.leaderboard.runs import REFUSAL
    from dtt_plugin.leaderboard.tables import plain
    from dtt_plugin.leaderboard.wording import rate_text

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
