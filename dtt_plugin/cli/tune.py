"""`dtt tune`: length and sink guard of a token file, by the probe alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, aligned, show
from dtt_plugin.cli.probe import add_probing_options

_EPILOG = """\
examples:
  dtt tune owner/target --tokens moved.safetensors -o tuned.safetensors
  dtt tune owner/target --tokens moved.safetensors --native own.safetensors -o tuned.safetensors
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tune` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "tune",
        help="turn a token file's length and sink guard by the probe",
        description="Try lengths of 0.5 to 3 times, without and with a sink guard (the special token that the model's"
        " prompts begin with, in front of the tokens), by at most 20 probes on training records; write the tokens with"
        " the lowest loss under attack whose effect on clean answers stays within the probe's limit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub id of the undefended chat model")
    add("--tokens", required=True, type=Path, metavar="FILE", help="token file for this model")
    add("-o", "--out", required=True, type=Path, help="token file to write")
    add_probing_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, write the tokens, print the report."""
    from dtt_plugin.probe.run import SHIPPED_DATA, ProbeOptions
    from dtt_plugin.probe.tune import rows, tune
    from dtt_plugin.tokens.files import save_tokens

    options = ProbeOptions(
        args.model,
        (args.tokens,),
        args.data or SHIPPED_DATA,
        native=args.native,
        source_report=args.source_report,
        dtype=args.dtype,
    )
    report, tokens = tune(options, progress=True)
    save_tokens(args.out, tokens)
    if args.json:
        show(report.to_json() | {"digest": tokens.digest, "out": str(args.out)}, as_json=True)
        return 0

    best = report.best
    guard = f"{report.guard_token} in front" if best.guard else "nothing in front"
    print(aligned(*rows(report)))
    print(f"\n{best.length:.3g} times the length, {guard}: {args.out} ({tokens.digest})")
    return 0
