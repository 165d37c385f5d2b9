"""`dtt leaderboard`: lm-eval's output folders as one comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.errors import DttError

if TYPE_CHECKING:
    from dtt_plugin.leaderboard.board import Bound, Leaderboard

_EPILOG = """\
examples:
  dtt leaderboard out/
  dtt leaderboard out/ --published --format latex > table.tex
  dtt leaderboard out/ --export mine.outcomes.json
  dtt leaderboard mine.outcomes.json theirs.outcomes.json
  dtt leaderboard out/ soft.attacks.jsonl
  dtt leaderboard out/ --html report.html --figures figures/ --tokens moved.safetensors
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `leaderboard` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "leaderboard",
        help="compare runs of lm-eval, with intervals and tests",
        description="Compare runs of lm-eval on prompt-injection tasks: rates with exact intervals, paired tests "
        "with Holm's correction, gap-closed ratios and costs. Reads the folders of --output_path with --log_samples.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        metavar="RESULTS",
        type=Path,
        nargs="+",
        help="output folders, results or outcome files, and soft attacks",
    )
    formats = ("terminal", "markdown", "csv", "latex", "json")
    parser.add_argument("--format", choices=formats, default="terminal", help="what is printed (default: terminal)")
    parser.add_argument(
        "--floor",
        type=float,
        default=0.10,
        metavar="SHARE",
        help="rank nothing where the undefended ASR(max) lies under it (default 0.10)",
    )
    parser.add_argument("--seed", type=int, default=20_260, help="of the bootstrap (default 20260)")
    parser.add_argument("--published", action="store_true", help="add published figures as rows, marked as such")
    report = parser.add_argument_group("files")
    report.add_argument("--html", type=Path, metavar="FILE", help="write the report as one HTML file")
    report.add_argument(
        "--without-samples",
        action="store_true",
        help="leave prompts, responses and this machine's paths out of the HTML file, so that it can be published",
    )
    report.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write what was measured, without any text (.outcomes.json)",
    )
    report.add_argument("--figures", type=Path, metavar="DIR", help="write figures (PNG and SVG)")
    report.add_argument(
        "--tokens", type=Path, nargs="+", default=[], metavar="FILE", help="token files whose geometry is shown"
    )
    report.add_argument(
        "--log", type=Path, nargs="+", default=[], metavar="FILE", help="training logs whose curves are shown"
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, compare, print, and write what was asked for."""
    from dtt_plugin.leaderboard import sheets
    from dtt_plugin.leaderboard.comparison import build
    from dtt_plugin.leaderboard.curves import read_curves
    from dtt_plugin.leaderboard.lm_eval_files import read_runs
    from dtt_plugin.leaderboard.outcome_files import write_outcomes
    from dtt_plugin.tokens.geometry import read_geometry

    if not 0 <= args.floor <= 1:
        raise DttError(f"--floor {args.floor} is not a share; give a number from 0 to 1.")
    if args.seed < 0:
        raise DttError(f"--seed {args.seed} is negative; give 0 or more.")
    if args.without_samples and not args.html:
        raise DttError("--without-samples is about the HTML file; name one with --html.")
    bounds: list[Bound] = []
    runs, problems = read_runs(args.results, bounds=bounds)
    if not runs and not bounds:
        for problem in problems[:-1]:
            print(f"dtt leaderboard: {sheets.plain(problem)}", file=sys.stderr)
        raise DttError(sheets.plain(problems[-1]))
    if args.export and not runs:
        raise DttError("--export is about runs, and there is none; a file of attacks holds its own outcomes.")
    if args.export:
        write_outcomes(args.export, runs)
    geometries = read_geometry(args.tokens, problems, [run.model for run in runs])
    curves = read_curves(args.log, problems)
    board = build(runs, floor=args.floor, seed=args.seed, published=args.published, problems=problems, bounds=bounds)
    _print(board, "json" if args.json else args.format)
    if args.html:
        from dtt_plugin.leaderboard.page import write_report

        inputs = [*args.results, *args.tokens, *args.log]
        write_report(args.html, board, runs, geometries, curves, samples=not args.without_samples, inputs=inputs)
    if args.figures:
        from dtt_plugin.leaderboard.figures import write_figures

        write_figures(args.figures, board, geometries, curves)
    return 0


def _print(board: Leaderboard, form: str) -> None:
    from dtt_plugin.leaderboard import sheets, tables

    if form == "json":
        show(board.to_dict(), as_json=True)
        return
    if form == "terminal":
        try:
            tables.print_terminal(board)
        except ImportError:  # rich comes with the extra `report`
            print(tables.markdown(board), end="")
        return
    texts = {"markdown": tables.markdown, "csv": tables.comma_separated, "latex": tables.latex}
    print(texts[form](board), end="")
    for problem in board.problems if form == "csv" else ():
        print(f"dtt leaderboard: {sheets.plain(problem)}", file=sys.stderr)
