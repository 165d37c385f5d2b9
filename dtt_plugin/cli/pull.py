"""`dtt pull`: a token file from the hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add `dtt pull`."""
    parser: argparse.ArgumentParser = subparsers.add_parser("pull", help="download a token file from the hub")
    parser.add_argument("repo", help="owner/name on the hub, as `dtt push` made it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the token file to write")
    parser.add_argument("--revision", help="branch, tag or commit")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt pull`."""
    from dtt_plugin.tokens.licence import licence_of
    from dtt_plugin.tokens.sharing import pull_tokens

    tokens = pull_tokens(args.repo, args.out, revision=args.revision)
    report = {"written": str(args.out), "model": tokens.model, "method": tokens.method, "sha256": tokens.digest}
    show({**report, "licence": licence_of(tokens)}, as_json=args.json)
    return 0
