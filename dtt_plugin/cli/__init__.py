"""The `dtt` command: parses, calls one function of the library, prints.

Each command is a module of this package with `add_parser(subparsers)`; what it
needs beyond argparse is imported when the command runs, so that `dtt --help`
stays instant and works without torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import dtt_plugin
from dtt_plugin.errors import DttError
from dtt_plugin.safe_text import one_line

COMMANDS = (
    "align",
    "transfer",
    "probe",
    "tune",
    "train",
    "attack",
    "convert",
    "push",
    "pull",
    "bake",
    "serve",
    "inspect",
    "sweep",
    "leaderboard",
    "diff",
    "compare",
    "rescore",
    "cache",
    "fetch",
    "demo",
    "doctor",
)
_GONE = "The current folder was removed; change to another one."

_LONGEST_SENTENCE = 2000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))  # it repeats arguments, which may be names of files that `*` found


def parser() -> argparse.ArgumentParser:
    """Build the parser of `dtt` with every command."""
    main_parser = _Parser(
        prog="dtt",
        description="Transfer DefensiveTokens between language models and measure what they are worth.",
    )
    main_parser.add_argument("--version", action="version", version=f"dtt-plugin {dtt_plugin.__version__}")
    subparsers = main_parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        importlib.import_module(f"dtt_plugin.cli.{command}").add_parser(subparsers)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dtt`; the exit code is 0 for success, 2 for bad input, else what the command returns."""
    # Read when torch is loaded, here or in a process started from here. Threads that spin while they wait keep the
    # core from the one they wait for, wherever the machine does something else too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except DttError as error:
        sentence = one_line(str(error))
        if len(sentence) > 2 * _LONGEST_SENTENCE:  # names in damaged files can have megabytes
            sentence = f"{sentence[:_LONGEST_SENTENCE]} ... {sentence[-_LONGEST_SENTENCE:]}"
        hint = f" {_GONE}" if _folder_is_gone() else ""
        print(f"dtt {args.command}: {sentence}{hint}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"dtt {args.command}: the memory is too small for this; close other programs.", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `head` has read enough; the code is that of a program that SIGPIPE ended
        _discard_output()
        return 141
    except OSError as error:
        if _folder_is_gone():
            print(f"dtt {args.command}: {_GONE}", file=sys.stderr)
            return 2
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"dtt {args.command}: the disk is full ({error.filename or 'standard output'}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = getattr(args, "kept", "nothing half-written is left")
        print(f"\ndtt {args.command}: interrupted; {kept}.", file=sys.stderr)
        return 130
    return code


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _discard_output() -> None:
    """Let what is left in the buffer go nowhere: Python writes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
