"""`dtt push`: a token file and its card onto the hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add `dtt push`."""
    parser: argparse.ArgumentParser = subparsers.add_parser("push", help="upload a token file with a card to the hub")
    parser.add_argument("tokens", type=Path, help="token file, published JSON, or a PEFT adapter's folder")
    parser.add_argument("repo", help="owner/name on the hub; made where it is missing")
    parser.add_argument("--tokens-model", metavar="ID", help="which model's entry of a JSON with several")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--accept-license",
        action="store_true",
        help="share tokens that come from the published ones under their licence, CC BY-NC 4.0",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt push`."""
    import dataclasses

    from dtt_plugin.tokens.files import load_tokens
    from dtt_plugin.tokens.sharing import push_tokens

    tokens = load_tokens(args.tokens, model=args.tokens_model)
    shared = push_tokens(tokens, args.repo, accept_licence=args.accept_license, private=args.private)
    show(dataclasses.asdict(shared), as_json=args.json)
    return 0
