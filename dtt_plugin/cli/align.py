"""`dtt align`: the map from one model's embedding space to another's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin.cli.output import add_json_option, show

if TYPE_CHECKING:
    from dtt_plugin.alignment import Alignment
    from dtt_plugin.alignment.heldout import HeldOut

_EPILOG = """\
examples:
  dtt align meta-llama/Llama-3.1-8B-Instruct meta-llama/Meta-Llama-3-8B-Instruct -o w.safetensors
  dtt align ./source ./target                     only print the go/no-go figures
  dtt align ./source ./t1 ./t2 ./t3 -o maps/      several targets, the source read once
"""


_INVERTED = {"procrustes": "M", "ridge": "X^T X", "relative": "Y^T Y", "whitened": "X^T X"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `align` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "align",
        help="find the orthogonal map between two embedding spaces",
        description="Find the orthogonal map W that takes the embeddings of SOURCE nearest to those of TARGET "
        "(orthogonal Procrustes over the tokens both share), and say how good it is; --method takes other linear maps.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="model: a folder, one .safetensors file, or a hub id")
    parser.add_argument("targets", metavar="TARGET", nargs="+", help="model(s) to align it to")
    parser.add_argument("-o", "--out", type=Path, help="alignment file to write; a folder for several targets")
    anchors = parser.add_argument_group("anchors")
    anchors.add_argument("--anchors", type=int, metavar="N", help="use a seeded sample of N shared tokens")
    anchors.add_argument(
        "--anchors-file", metavar="FILE", help="use only these tokens: one per line, or a JSON list of strings"
    )
    anchors.add_argument(
        "--match",
        choices=["tokens", "rows"],
        default="tokens",
        help="pair rows by the token they stand for (default), or by row number",
    )
    anchors.add_argument(
        "--weight",
        choices=["none", "norm"],
        default="none",
        help="norm: divide each row by its length, so that every token counts the same",
    )
    anchors.add_argument("--center", action="store_true", help="subtract both means first")
    solving = parser.add_argument_group("map")
    solving.add_argument(
        "--method",
        choices=["procrustes", "ridge", "relative", "whitened"],
        default="procrustes",
        help="orthogonal (default), or without that constraint: ridge regression, the reverse regression, or a "
        "rotation between whitened spaces; these read the same once and sum more",
    )
    solving.add_argument("--scale", action="store_true", help="apply the Procrustes scale factor in `dtt transfer`")
    solving.add_argument(
        "--allow-width-change", action="store_true", help="accept different widths; W is then semi-orthogonal"
    )
    solving.add_argument(
        "--holdout",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the anchors to measure on, at most 1000 (default 0.05); W itself uses all anchors",
    )
    solving.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    running.add_argument("--no-cache", action="store_true", help="solve again, and keep nothing")
    running.add_argument("--source-revision", metavar="REVISION", help="hub revision of SOURCE")
    running.add_argument("--target-revision", metavar="REVISION", help="hub revision of the TARGETs")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Align, write what was asked for, print the report."""
    from dtt_plugin.alignment import (
        AlignmentCache,
        AlignmentOptions,
        align_many,
        cache_folder,
        save_alignment,
    )
    from dtt_plugin.checkpoint.opening import open_checkpoint

    options = AlignmentOptions(
        method=args.method,
        match=args.match,
        anchors=args.anchors,
        anchors_file=args.anchors_file,
        weight=args.weight,
        center=args.center,
        scale=args.scale,
        allow_width_change=args.allow_width_change,
        holdout=args.holdout,
        seed=args.seed,
    )
    paths = _paths(args)
    source = open_checkpoint(args.source, revision=args.source_revision)
    targets = [open_checkpoint(target, revision=args.target_revision) for target in args.targets]
    cache = None if args.no_cache else AlignmentCache(cache_folder())
    alignments = align_many(source, targets, options, device=args.device, cache=cache, progress=True)
    reports = []
    for alignment, path in zip(alignments, paths, strict=True):
        if path is not None:
            save_alignment(path, alignment, with_costs=True)
        for warning in alignment.report.warnings:
            print(f"dtt align: {warning}", file=sys.stderr)
        out = None if path is None else str(path)
        reports.append(
            {**alignment.report.to_json(), "seconds": alignment.seconds, "cached": alignment.cached, "out": out}
        )
    if args.json:
        show(reports[0] if len(reports) == 1 else {"alignments": reports}, as_json=True)
    else:
        for number, (alignment, path) in enumerate(zip(alignments, paths, strict=True)):
            if number:
                print()
            show(_lines(alignment, path), as_json=False)
    return 0


def _paths(args: argparse.Namespace) -> list[Path | None]:
    """Return the file to write for each target."""
    from dtt_plugin.errors import DttError

    if args.out is None or len(args.targets) == 1:
        if args.out is not None and args.out.is_dir():
            raise DttError(f"--out {args.out} is a folder; give a file for the alignment.")
        return [args.out] * len(args.targets)
    if args.out.exists() and not args.out.is_dir():
        raise DttError(f"--out {args.out} is a file; several targets need a folder.")
    names = [target.strip("/.").replace("/", "--") + ".safetensors" for target in args.targets]
    if len(set(names)) < len(names):
        raise DttError("The same target is given twice; name each once.")
    return [args.out / name for name in names]


def _lines(alignment: Alignment, path: Path | None) -> dict[str, Any]:
    """Return what a person wants to see of the report, in the order of its use."""
    report = alignment.report
    lines: dict[str, Any] = {
        "source": f"{report.source_model} {report.source_shape} {report.source_dtype}",
        "target": f"{report.target_model} {report.target_shape} {report.target_dtype}",
        "anchors": f"{report.anchors} of {report.shared_tokens} shared tokens "
        f"({report.shared_share:.1%} of the smaller vocabulary)",
    }
    left_out = report.special_left_out
    if left_out:
        shown = " ".join(left_out[:6]) + (" ..." if len(left_out) > 6 else "")
        lines["special tokens left out"] = f"{len(left_out)}: {shown}"
    condition = "infinite" if report.condition is None else f"{report.condition:.4g}"
    lines |= {
        "residual": f"{report.residual:.6g} (relative {report.relative_residual:.4%})",
        "orthogonality error": report.orthogonality_error,
        f"rank of {_INVERTED[alignment.method]}": f"{report.rank} of {report.dimensions}, condition {condition}, "
        f"gap {report.gap:.3g}",
    }
    if alignment.method != "procrustes":
        penalty = report.penalty
        lines = {"method": alignment.method + ("" if penalty is None else f", lambda {penalty:.6g}")} | lines
    if report.distance_from_identity is not None:
        lines["distance from identity"] = f"{report.distance_from_identity:.4f} (0: identity, 1: random rotation)"
    lines["scale"] = f"{report.scale:.6g} ({'applied' if report.scale_applied else 'not applied'})"
    if report.held_out:
        lines |= _held_out_lines(report.held_out)
    seconds = alignment.seconds
    lines["seconds"] = (
        "from the cache"
        if alignment.cached
        else f"{sum(seconds.values()):.2f}: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    )
    lines["written"] = str(path) if path else "nothing (no --out)"
    return lines


def _held_out_lines(held: HeldOut) -> dict[str, str]:
    aligned, null = held.aligned, held.random_rotation

    def pair(name: str, spec: str) -> str:
        return f"{getattr(aligned, name):{spec}} (random rotation {getattr(null, name):{spec}})"

    smallest, mean, largest = held.norm_retained
    return {
        f"on {held.n} held-out tokens": f"fit without them: {held.fit}",
        "  cosine": pair("cosine", ".4f"),
        "  relative error": pair("relative_error", ".4f"),
        "  precision@1": pair("precision_at_1", ".1%"),
        "  precision@1 back": pair("precision_at_1_back", ".1%"),
        "  CSLS precision@1": pair("csls_precision_at_1", ".1%"),
        "  CSLS precision@1 back": pair("csls_precision_at_1_back", ".1%"),
        "  norm retained": f"{smallest:.6f} to {largest:.6f}, mean {mean:.6f}",
    }
