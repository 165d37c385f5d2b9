"""`dtt doctor`: check an installation, one line each."""

from __future__ import annotations

import argparse
from typing import Any

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.safe_text import one_line


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation, the data, a model and a token file",
        description="Check that lm-eval finds the models and tasks, that the engines import, that the data is the"
        " protocol's, and, if given, that a model's chat template renders and a token file fits it. Exit code 1 where"
        " something is missing.",
    )
    parser.add_argument("--model", help="a model to check: folder or hub id")
    parser.add_argument("--tokens", metavar="FILE", help="a token file to check, against --model if given")
    parser.add_argument("--tokens-model", metavar="ID", help="the entry of an upstream JSON")
    parser.add_argument(
        "--records",
        metavar="FILE",
        help="check a file for the task injection_records, and nothing else: its form, and one prompt of each variant,"
        " as --model renders it if given",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.doctor import examine, examine_records

    findings = []
    checks = (
        examine_records(args.records, args.model)
        if args.records
        else examine(args.model, args.tokens, args.tokens_model)
    )
    for finding in checks:
        findings.append(finding)
        if not args.json:
            print(f"{'ok' if finding.ok else 'NO':<3} {finding.check}: {one_line(finding.message)}", flush=True)
    if args.json:
        show({finding.check: finding._asdict() for finding in findings}, as_json=True)
    return 0 if all(finding.ok for finding in findings) else 1
