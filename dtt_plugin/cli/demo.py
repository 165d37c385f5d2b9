"""`dtt demo`: the main job on a small real model."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

_MODELS = ("qwen2.5-coder-0.5b", "smollm2")  # dtt_plugin.demo.model.MODELS


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="see a defense work on a small real model",
        description="Get a small model, attack it undefended, with reminder, with sandwich and with five trained"
        " DefensiveTokens, then move these to a turned twin of it: copied, and by Procrustes. Runs on 2 CPU cores. Exit"
        " code 1 where the model resists by itself or the tokens do not help.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--model", choices=_MODELS, default=_MODELS[0], help="default: %(default)s")
    parser.add_argument("--engine", choices=("dtt_vllm", "dtt_hf"), default="dtt_vllm", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=14, help="records per arm, of 48 (default: %(default)s)")
    parser.add_argument("--max-new", type=int, default=32, help="new tokens per response (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what engines and libraries print")
    parser.set_defaults(run=run, kept="finished arms are kept, and the same command goes on behind them")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.demo.run import REPORT, demo, sentences, table
    from dtt_plugin.sweep.run import LOG

    started = time.perf_counter()
    print(f"{args.limit} records x 4 prompts an arm; engine and library logs: {args.out / LOG}", flush=True)
    outcome = demo(
        args.out,
        model=args.model,
        engine=args.engine,
        limit=args.limit,
        max_new=args.max_new,
        verbose=args.verbose,
    )
    print(f"\n{table(outcome)}\n")
    for sentence in sentences(outcome):
        print(textwrap.fill(sentence, 100))
    print(f"\n{time.perf_counter() - started:.0f} s. Prompts and answers: {args.out / REPORT}")
    print("Next, your own model: dtt doctor MODEL")
    _open(args.out / REPORT)
    return 0 if outcome.shows_the_defense else 1


def _open(page: Path) -> None:
    """Show the page where somebody sits in front of a desktop."""
    if sys.stdout.isatty() and (sys.platform == "darwin" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
