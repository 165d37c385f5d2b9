"""`dtt sweep`: a grid of lm-eval runs, ending in the leaderboard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "sweep",
        help="run a grid of models, defenses and token files",
        description="Run every cell of a grid (models x defenses x token files) with lm-eval, each model loaded as"
        " seldom as can be, and end in the leaderboard. Started again it goes on where it was.",
    )
    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="the grid, a YAML file (docs/sweep.md)")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder for results (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check the file and list the cells, run nothing")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="run the models side by side on a Ray cluster: the one at ADDRESS, else RAY_ADDRESS's or this machine's"
        " (docs/scale.md)",
    )
    parser.add_argument("--verbose", action="store_true", help="show what engines and libraries print")
    parser.set_defaults(run=run, kept="finished cells are kept, and the same command goes on behind them")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.progress import Steps
    from dtt_plugin.sweep.file import read_sweep
    from dtt_plugin.sweep.loads import count_loads
    from dtt_plugin.sweep.run import download_settings, run_sweep

    cells = read_sweep(args.sweep)
    if not args.dry_run:
        download_settings(cells)
    to_do, problems = [], []
    for cell in cells:
        try:
            state = "finished" if cell.is_finished(args.out) else "to do"
            print(f"{state:<8}  {cell.folder(args.out).name}")
            if state == "to do":
                to_do.append(cell)
        except DttError as error:
            print(f"{'fails':<8}  {cell.name}")
            problems.append(error)
    loads = count_loads(to_do) if args.ray is None else len({id(cell.load) for cell in to_do})
    print(f"{len(cells)} cells; {loads} models to load.", flush=True)
    if args.dry_run:
        if problems:
            raise DttError(f"{len(problems)} of {len(cells)} cells can't be run: {problems[0]}")
        return 0
    if args.ray is not None:
        from dtt_plugin.sweep.ray_cells import run_sweep_on_ray
        from dtt_plugin.sweep.resources import read_resources

        failed = run_sweep_on_ray(cells, args.out, address=args.ray or None, resources=read_resources(args.sweep))
    else:
        steps = Steps(width=44)
        try:
            failed = run_sweep(cells, args.out, verbose=args.verbose, listen=steps.hear)
        finally:
            steps.end()
    code = 0
    if len(failed) < len(cells):
        from dtt_plugin.cli import main

        print()
        # Not the whole folder: cells of an earlier version of the file may stand there, too.
        lost = set(map(id, failed))
        finished = [str(cell.folder(args.out)) for cell in cells if id(cell) not in lost]
        code = main(["leaderboard", *finished])
    if failed:
        names = ", ".join(cell.name for cell in failed)
        raise DttError(f"{len(failed)} of {len(cells)} cells failed, see above ({names}); start the sweep again.")
    return code
