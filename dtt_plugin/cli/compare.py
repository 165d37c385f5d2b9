"""`dtt compare`: two runs side by side, and a gate for CI."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, aligned, show

FAILED = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two runs; fail where a defense got worse",
        description="Compare two runs on the same records. Exit code 3 where a condition of --fail-if holds. A"
        " condition is made of asr(A), the highest of the attacks' rates; asr_any(A); refusal(A); p(A, B), exact"
        " McNemar; numbers, + - * /, < <= > >=, and, or, not.",
        epilog="example:\n  dtt compare before/ after/ --fail-if 'asr(B) - asr(A) > 0.05' --junit gate.xml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="output folder or results file of one run")
    parser.add_argument("b", metavar="B", type=Path, help="of the other")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION", help="may be given again")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the conditions' outcomes as JUnit XML")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and fail where a condition holds."""
    from dtt_plugin.errors import DttError
    from dtt_plugin.leaderboard import gate
    from dtt_plugin.leaderboard.differences import differences, small_differences
    from dtt_plugin.leaderboard.flips import check_paired
    from dtt_plugin.leaderboard.lm_eval_files import read_run
    from dtt_plugin.leaderboard.sheets import plain
    from dtt_plugin.leaderboard.wording import p_text, points, rate_text

    started = time.perf_counter()
    if args.junit and not args.fail_if:
        raise DttError("--junit reports conditions; give at least one with --fail-if.")
    a, b = read_run(args.a), read_run(args.b)
    check_paired(a, b)
    if apart := differences(a, b):
        names = " and ".join(difference.name for difference in apart)
        raise DttError(
            f"{a.path} and {b.path} differ in {names}; run both in the same way, but for defense and tokens:"
            f" {apart[0].told('in A', 'in B')}."
        )
    for measured in (a, b):
        if measured.misread:
            raise DttError(f"{measured.path}: {measured.notes[-1]}")
    figures = gate.figures(a, b)
    outcomes = {condition: gate.holds(condition, {"A": a, "B": b}) for condition in args.fail_if}
    rows = [
        [plain(name), rate_text(row.A), rate_text(row.B), points(row.effect), p_text(row.p)]
        for name, row in figures.items()
    ]
    text = aligned(["", f"A {plain(a.defense)}", f"B {plain(b.defense)}", "B - A", "McNemar"], rows)
    if args.junit:
        gate.write_junit(args.junit, outcomes, text, time.perf_counter() - started)
    if args.json:
        differ_in = [difference.name for difference in small_differences(a, b)]
        rates = {name: asdict(row) for name, row in figures.items()}
        report = {"A": str(a.path), "B": str(b.path), "differ_in": differ_in, "rates": rates, "fail_if": outcomes}
        report["unfinished"] = {"A": a.unfinished, "B": b.unfinished}
        show(report, as_json=True)
    else:
        print(text)
        for name, measured in (("A", a), ("B", b)):
            for note in measured.notes:
                print(f"{name} {note}")
        if told := [difference.told("in A", "in B") for difference in small_differences(a, b)]:
            print(f"A and B differ in {plain(', '.join(told))}.")
        for condition, failed in outcomes.items():
            print(f"{'FAILED' if failed else 'passed'}: {condition}")
    return FAILED if any(outcomes.values()) else 0
