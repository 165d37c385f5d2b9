"""`dtt inspect`: what a file or folder of this plugin is, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add `dtt inspect`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="say what a token file, alignment file or defended checkpoint is, and whether it was altered",
    )
    parser.add_argument("path", type=Path, help="a token file, the published JSON, an alignment file or a folder")
    parser.add_argument("--tokens-model", metavar="ID", help="which model's entry of a JSON with several")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt inspect`; the exit code is 1 for a defended checkpoint that was altered."""
    from dtt_plugin.inspection import inspect_path

    report = inspect_path(args.path, tokens_model=args.tokens_model)
    show(report, as_json=args.json)
    return 1 if report.get("altered") else 0
