"""`dtt probe`: a go or no-go for tokens on a model, by forward passes alone."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, aligned, show

_EPILOG = """\
examples:
  dtt probe owner/target --tokens moved.safetensors
  dtt probe owner/target --tokens moved.safetensors copied.safetensors --native own.safetensors
  dtt probe owner/source --tokens own.safetensors --json > source.json
  dtt probe owner/target --tokens moved.safetensors --source-report source.json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `probe` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "probe",
        help="tell before an evaluation whether tokens defend a model",
        description="Forward passes on 32 attacked and 32 clean training records: the loss of the model's own"
        " undisturbed answer under attack, the log-odds of what is injected, and how far clean answers move; beside"
        " them random isometries of the same tokens. Prints GO, NO-GO or BREAKS THE MODEL and the rule that gave it."
        " Says nothing of an adaptive attacker, and is no measurement of ASR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub id of the undefended chat model")
    add("--tokens", required=True, type=Path, nargs="+", metavar="FILE", help="token files for this model")
    add("--isometries", type=int, default=5, metavar="N", help="random isometries of each file's tokens (default 5)")
    add_probing_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def add_probing_options(parser: argparse.ArgumentParser) -> None:
    """Add what `dtt probe` and `dtt tune` are told alike."""
    add = parser.add_argument
    add("--data", metavar="FILE|ID", help="training records, as for dtt train (default: the ones that are shipped)")
    add("--native", type=Path, metavar="FILE", help="the model's own tokens, as the reference")
    add("--source-report", type=Path, metavar="FILE", help="JSON of a probe of the source tokens on their own model")
    add("--dtype", default="auto", help="of the weights: auto (default), float32, bfloat16, float16")


def run(args: argparse.Namespace) -> int:
    """Probe, print the report."""
    from dtt_plugin.probe.run import SHIPPED_DATA, ProbeOptions, probe, rows

    given = {field.name: getattr(args, field.name) for field in fields(ProbeOptions)}
    report = probe(
        ProbeOptions(**given | {"tokens": tuple(args.tokens), "data": args.data or SHIPPED_DATA}),
        progress=True,
    )
    if args.json:
        show(report.to_json(), as_json=True)
        return 0
    print(aligned(*rows(report)))
    print()
    for found in report.tokens:
        print(f"{found.file}: {found.judgement.verdict}: {found.judgement.rule}.")
    return 0
