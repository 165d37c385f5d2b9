"""`dtt doctor`: check an installation, one line each."""

from __future__ import annotations

import argparse
from typing import Any

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.errors import DttError
from dtt_plugin.safe_text import one_line


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation, and how long an evaluation will take",
        description="Check that lm-eval finds the models and tasks, that the engines import, that the data is the"
        " protocol's, and, if given, that a model's chat template renders and a token file fits it. With MODEL it also"
        " measures for some seconds and prints the standard evaluation's time and command. Exit code 1 where something"
        " is missing.",
    )
    parser.add_argument("timed", metavar="MODEL", nargs="?", help="a model to check and to time: folder or hub id")
    parser.add_argument("--model", help="a model to check only")
    parser.add_argument("--engine", choices=("dtt_vllm", "dtt_hf"), help="to time (default: dtt_vllm where it imports)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measurement (default: %(default)g)")
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
    from dtt_plugin.doctor import ENGINES, examine, examine_records

    findings = []
    model = args.timed or args.model
    checks = examine_records(args.records, model) if args.records else examine(model, args.tokens, args.tokens_model)
    for finding in checks:
        findings.append(finding)
        if not args.json:
            print(f"{'ok' if finding.ok else 'NO':<3} {finding.check}: {one_line(finding.message)}", flush=True)
    report: dict[str, Any] = {finding.check: finding._asdict() for finding in findings}
    if args.timed and not args.records:
        engines = [args.engine] if args.engine else [name for name, check in ENGINES.items() if report[check]["ok"]]
        if not engines:
            raise DttError("No engine imports, see above, so nothing can be timed.")
        report["estimate"] = _estimate(args.timed, args.tokens, engines[0], args.seconds, quiet=args.json)
    if args.json:
        show(report, as_json=True)
    return 0 if all(finding.ok for finding in findings) else 1


def _estimate(model: str, tokens: str | None, engine: str, seconds: float, *, quiet: bool) -> dict[str, Any]:
    """Measure, print what follows, and return it."""
    from dataclasses import asdict

    from dtt_plugin.estimate import STANDARD, estimate
    from dtt_plugin.paths import cache_folder
    from dtt_plugin.progress import Steps

    log = cache_folder("logs") / "doctor.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    steps = Steps()
    try:
        found = estimate(model, tokens, engine, seconds=seconds, log=log, listen=steps.hear)
    finally:
        steps.end()
    if not quiet:
        rate = found.prompt_tokens / found.measured_s
        minutes = found.evaluation_s / 60
        print(f"\n{found.device}: {found.prompts} prompts in {found.measured_s:.1f} s, {rate:.0f} prompt tokens/s")
        print(f"{STANDARD}, 832 prompts: about {minutes:.0f} min" if minutes >= 1 else "under a minute")
        print(f"\n  {one_line(found.command)}")
    return asdict(found)
