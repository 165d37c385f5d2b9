"""`dtt bake`: a defended checkpoint for any engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add `dtt bake`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bake",
        help="put DefensiveTokens into a copy of a model's checkpoint",
        description="Write a defended checkpoint: only files with a changed tensor are written, the others "
        "are linked. It serves under vLLM, transformers and any other engine, with the tokens on by default.",
    )
    parser.add_argument("model", help="the base model: a folder or a hub id")
    parser.add_argument("--tokens", required=True, metavar="FILE", help="token file, or the published JSON")
    parser.add_argument("--tokens-model", metavar="ID", help="which model's entry of a JSON with several")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--prompt-format", metavar="NAME", help="default: the one that the tokens were trained with")
    parser.add_argument(
        "--default-off",
        dest="default_on",
        action="store_false",
        help="leave the tokens out unless a request passes add_defensive_tokens=true, as the published "
        "checkpoints do (a server is then undefended by default)",
    )
    parser.add_argument(
        "--reuse-reserved",
        action="store_true",
        help="overwrite unused reserved tokens, so that no tensor changes its shape",
    )
    parser.add_argument(
        "--system-in-user",
        action="store_true",
        help="for templates without a system role: put the instruction in front of the data",
    )
    parser.add_argument(
        "--trust-assistant",
        action="store_true",
        help="leave control tokens in assistant messages as they are, where no client can send one that it made up",
    )
    parser.add_argument(
        "--keep-bos",
        action="store_true",
        help="let the tokenizer go on adding a BOS to plain text (a string prompt then gets BOS, tokens, BOS)",
    )
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="write the changed tensors alone and link everything else; only for loaders that read weight "
        "files in the order of their names, as transformers and vLLM's default one do",
    )
    parser.add_argument("--copy", action="store_true", help="copy unchanged files instead of linking them")
    parser.add_argument("--force", action="store_true", help="replace a defended checkpoint at --out")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="don't read the result back")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt bake`."""
    import dataclasses
    import sys

    from dtt_plugin.bake import BakeOptions, bake
    from dtt_plugin.prompt.formats import protection
    from dtt_plugin.tokens.files import load_tokens

    report = bake(
        args.model,
        load_tokens(Path(args.tokens), model=args.tokens_model),
        args.out,
        BakeOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(BakeOptions)}),
        force=args.force,
    )
    table = dataclasses.asdict(report)
    table["folder"] = str(report.folder)
    show(table, as_json=args.json)
    if said := protection(report.prompt_format, report.plain_text_markers):
        print(f"dtt bake: {said}", file=sys.stderr)
    return 0
