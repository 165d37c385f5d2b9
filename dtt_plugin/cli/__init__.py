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

import dtt_plugin
from dtt_plugin.errors import DttError
from dtt_plugin.safe_text import printable

COMMANDS = (
    "align",
    "transfer",
    "probe",
    "train",
    "convert",
    "push",
    "pull",
    "bake",
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


def parser() -> argparse.ArgumentParser:
    """Build the parser of `dtt` with every command."""
    main_parser = argparse.ArgumentParser(
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
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except DttError as error:
        print(f"dtt {args.command}: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `head` has read enough; the code is that of a program that SIGPIPE ended
        _discard_output()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"dtt {args.command}: the disk is full ({error.filename or 'standard output'}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dtt {args.command}: interrupted", file=sys.stderr)
        return 130
    return code


def _discard_output() -> None:
    """Let what is left in the buffer go nowhere: Python writes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
