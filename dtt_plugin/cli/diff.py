"""`dtt diff`: the records that flipped between two runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `diff` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "diff",
        help="show the records that flipped between two runs",
        description="Print each record whose outcome differs between two runs on the same records, attack by attack, "
        "with both responses. Control characters in responses are spelt out.",
    )
    parser.add_argument("a", metavar="A", type=Path, help="output folder or results file of one run")
    parser.add_argument("b", metavar="B", type=Path, help="of the other")
    parser.add_argument("--attack", help="only this attack, or benign")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what flipped."""
    from dtt_plugin.errors import DttError
    from dtt_plugin.leaderboard.differences import differences, small_differences
    from dtt_plugin.leaderboard.flips import flips
    from dtt_plugin.leaderboard.lm_eval_files import read_run
    from dtt_plugin.leaderboard.sheets import plain
    from dtt_plugin.tasks.description import BENIGN

    a, b = read_run(args.a), read_run(args.b)
    names = [*a.attacks, BENIGN]
    if args.attack and args.attack not in names:
        raise DttError(f"--attack {args.attack!r} is not in these runs; they have {', '.join(names)}.")
    found = [flip for flip in flips(a, b) if args.attack in (None, flip.a.attack)]
    apart = [*differences(a, b), *small_differences(a, b)]
    if args.json:
        rows = [
            {
                "record_id": flip.a.record_id,
                "attack": flip.a.attack,
                "worse": flip.worse,
                "instruction": flip.a.instruction,
                "data": flip.a.data,
                "A": flip.a.text,
                "B": flip.b.text,
            }
            for flip in found
        ]
        names = [difference.name for difference in apart]
        show({"A": str(a.path), "B": str(b.path), "differ_in": names, "flips": rows}, as_json=True)
        return 0
    for flip in found:
        event = "refused" if flip.a.attack == BENIGN else "hacked"
        which = f"{event} in {'B' if flip.worse else 'A'} only"
        print(f"{plain(flip.a.attack)}, record {flip.a.record_id}: {which}")
        print(f"  instruction  {_beginning(flip.a.instruction)}")
        print(f"  A  {_beginning(flip.a.text)}\n  B  {_beginning(flip.b.text)}")
    worse = sum(flip.worse for flip in found)
    print(f"{len(found)} flipped: {worse} worse and {len(found) - worse} better in B ({plain(b.defense)})")
    if apart:
        print(f"A and B differ in {plain(', '.join(difference.told('in A', 'in B') for difference in apart))}.")
    return 0


def _beginning(text: str) -> str:
    from dtt_plugin.leaderboard.sheets import plain

    line = plain(text)
    return line if len(line) <= 300 else f"{line[:300]} [{len(line) - 300} more, see --json]"
