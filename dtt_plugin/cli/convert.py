"""`dtt convert`: tokens from any form to a token file, the published JSON or an adapter."""

from __future__ import annotations

import argparse
import os.path
from pathlib import Path
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add `dtt convert`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="convert tokens between token file, published JSON and PEFT prompt-tuning adapter",
        description="The output's name decides: NAME.safetensors is a token file, NAME.json the published JSON, "
        "any other name the folder of a prompt-tuning adapter that PEFT loads.",
    )
    parser.add_argument("tokens", type=Path, help="token file, published JSON, or an adapter's folder")
    parser.add_argument("out", type=Path, help="what to write")
    parser.add_argument(
        "--to",
        choices=("lora",),
        help="lora: the folder of a LoRA adapter of the embedding, with tokenizer and template, for --model",
    )
    parser.add_argument("--model", help="with --to lora: the base model, folder or hub id")
    parser.add_argument("--tokens-model", metavar="ID", help="which model's entry of a JSON with several")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt convert`."""
    from dtt_plugin.errors import DttError
    from dtt_plugin.tokens.files import load_tokens, save_adapter, save_as_upstream_json, save_tokens

    if bool(args.to) != bool(args.model):
        raise DttError("--to lora and --model BASE need each other; give both or none.")
    tokens = load_tokens(args.tokens, model=args.tokens_model)
    if os.path.lexists(args.out):
        raise DttError(f"{args.out} already exists; choose another name.")
    more: dict[str, Any] = {}
    if args.to:
        from dtt_plugin.serving.lora import write_lora
        from dtt_plugin.serving.placing import TokenFile

        more["token_ids"] = write_lora(TokenFile(str(args.tokens), args.tokens_model), args.out, model=args.model)
    elif args.out.suffix == ".safetensors":
        save_tokens(args.out, tokens)
    elif args.out.suffix == ".json":
        save_as_upstream_json(args.out, tokens)
    else:
        save_adapter(args.out, tokens)
    report = {"written": str(args.out), "k": tokens.k, "width": tokens.width, "sha256": tokens.digest, **more}
    show(report, as_json=args.json)
    return 0
