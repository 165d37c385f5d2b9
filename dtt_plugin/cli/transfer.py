"""`dtt transfer`: DefensiveTokens of one model for another."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.errors import DttError
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import one_line
from dtt_plugin.tokens.methods import CONTROLS, MAPS

if TYPE_CHECKING:
    from dtt_plugin.alignment import Alignment
    from dtt_plugin.tokens.files import DefensiveTokens
    from dtt_plugin.transfer.move import Comparison

_EPILOG = """\
examples:
  dtt transfer tokens.safetensors w.safetensors -o moved.safetensors
  dtt transfer published w.safetensors --compare --native published
  dtt transfer tokens.safetensors w.safetensors --method zero-pad --norm source -o padded.safetensors
  dtt transfer tokens.safetensors --method copy --target-model owner/name -o copied.safetensors
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `transfer` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "transfer",
        help="move DefensiveTokens to another model's embedding space",
        description="Move DefensiveTokens to another model's embedding space with the map of `dtt align`, "
        "or with a control (copy, zero-pad, random isometry).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suppress = argparse.SUPPRESS  # a positional that is not given must not undo the option of the same name
    parser.add_argument(
        "tokens", metavar="TOKENS", nargs="?", default=suppress, help="token file, upstream JSON, or `published`"
    )
    parser.add_argument(
        "alignment", metavar="ALIGNMENT", nargs="?", default=suppress, help="file written by `dtt align`"
    )
    parser.add_argument("--tokens", dest="tokens", metavar="FILE", help="the same as TOKENS")
    parser.add_argument("--alignment", dest="alignment", metavar="FILE", help="the same as ALIGNMENT")
    parser.add_argument("-o", "--out", type=Path, help="token file to write")
    parser.add_argument(
        "--tokens-model",
        metavar="ID",
        help="which entry of an upstream JSON (default: the alignment's source)",
    )
    parser.add_argument(
        "--target-model", metavar="ID", help="what the new tokens are for (default: the alignment's target)"
    )
    parser.add_argument(
        "--method",
        choices=[*MAPS, *CONTROLS],
        help="that of ALIGNMENT (default), or a control: the values as they are, zeros appended for another width, "
        "or a random isometry",
    )
    parser.add_argument(
        "--norm",
        metavar="source|native|FLOAT",
        help="rescale every token: to its length before, to the mean length of --native, or to a number",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --method random (default 0)")
    parser.add_argument("--native", metavar="FILE", help="the target's own tokens, to compare with")
    parser.add_argument("--native-model", metavar="ID", help="which entry of an upstream JSON (default: the target)")
    parser.add_argument("--compare", action="store_true", help="print a table over all methods")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Transfer, write what was asked for, print the report."""
    from dtt_plugin.alignment import load_alignment
    from dtt_plugin.tokens.files import load_tokens, save_tokens
    from dtt_plugin.transfer.move import COPY_NOTE, compare, compare_methods, transfer

    args.tokens, args.native = _file(args.tokens), _file(args.native)
    if args.tokens is None:
        raise DttError("Which tokens? Give a token file: dtt transfer TOKENS ALIGNMENT -o OUT.")
    if args.out is None and not args.compare:
        raise DttError("Where to? Give -o FILE, or --compare to look only.")
    alignment = load_alignment(args.alignment) if args.alignment else None
    tokens = load_tokens(args.tokens, model=_entry(args.tokens, args.tokens_model, alignment, "source_model"))
    native = None
    if args.native:
        native_model = args.native_model or args.target_model
        native = load_tokens(args.native, model=_entry(args.native, native_model, alignment, "target_model"))
    if alignment and public_name(tokens.model) != public_name(alignment.source_model):
        sentence = (
            f"the tokens belong to {tokens.model}, the alignment starts from {alignment.source_model}; make sure that "
            "these are the same model"
        )
        print(f"dtt transfer: {one_line(sentence)}", file=sys.stderr)
    target = args.target_model or (native.model if native and not alignment else None)
    options: dict[str, Any] = {"target_model": target, "norm": args.norm, "native": native, "seed": args.seed}
    report: dict[str, Any] = {}
    if args.out is not None:
        started = time.perf_counter()
        moved = transfer(tokens, alignment, method=args.method, **options)
        costs = (alignment.costs if alignment else {}) | {"transfer_seconds": time.perf_counter() - started}
        moved = replace(moved, metadata=moved.metadata | {name: str(cost) for name, cost in costs.items()})
        comparison = compare(tokens, moved, alignment=alignment, native=native)
        save_tokens(args.out, moved)
        report = _report(moved, comparison, args.out)
    if args.compare:
        methods = compare_methods(tokens, alignment, **options)
        if args.json:
            report["methods"] = [asdict(found) for found in methods]
        else:
            _print_table(methods)
            for found in methods:
                if found.is_copy and found.angle_to_source and found.method in MAPS:
                    widest = max(found.angle_to_source)
                    print(f"{found.method}: {COPY_NOTE} (angles of at most {widest:.3g} degrees).")
    show(report, as_json=args.json)
    return 0


def _file(name: str | None) -> str | None:
    """Return the file that is meant: `published` is the one that `dtt fetch` downloads."""
    from dtt_plugin.data.records import PUBLISHED, TOKENS_FILE, data_file

    return str(data_file(TOKENS_FILE)) if name == PUBLISHED else name


def _entry(path: str, chosen: str | None, alignment: Alignment | None, side: str) -> str | None:
    """Return which entry of an upstream JSON is meant; a token file has only one."""
    if chosen or alignment is None or not path.endswith(".json"):
        return chosen
    from dtt_plugin.tokens.files import upstream_models

    name = public_name(getattr(alignment, side))
    entries = [entry for entry in upstream_models(path) if public_name(entry) == name]
    return entries[0] if len(entries) == 1 else None


def _report(moved: DefensiveTokens, comparison: Comparison, out: Path) -> dict[str, Any]:
    return {
        "source_model": moved.source_model,
        "model": moved.model,
        "method": moved.method,
        "k": moved.k,
        "width": moved.width,
        "prompt_format": moved.prompt_format,
        "norms": comparison.norms,
        "norm_ratio": comparison.norm_ratio,
        "cosine_to_source": comparison.cosine_to_source,
        "angle_to_source": comparison.angle_to_source,
        "cosine_to_native": comparison.cosine_to_native,
        "distance_from_identity": comparison.distance_from_identity,
        "digest": moved.digest,
        "out": str(out),
    }


def _print_table(methods: list[Comparison]) -> None:
    """Print one line per method; figures over the tokens as smallest .. largest."""
    columns = (
        "norms",
        "norm_ratio",
        "cosine_to_source",
        "angle_to_source",
        "cosine_to_native",
        "distance_from_identity",
    )
    rows = [["method", *(name.replace("_", " ") for name in columns)]]
    for method in methods:
        rows.append([method.method, *(_cell(getattr(method, name)) for name in columns)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: float | list[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{min(value):.4g} .. {max(value):.4g}"
    return f"{value:.6g}"
