"""`dtt demo`: the main job on a small real model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole job on a small real model",
        description="Get SmolLM2-135M-Instruct, transfer DefensiveTokens to it from a turned twin, and evaluate it"
        " through lm_eval: undefended, with reminder, with sandwich, with the transferred tokens. Runs on 2 CPU cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--engine", choices=("dtt_vllm", "dtt_hf"), default="dtt_vllm", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=16, help="records per arm, of 48 (default: %(default)s)")
    parser.add_argument("--max-new", type=int, default=64, help="new tokens per response (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.demo.run import demo

    table, steps = demo(args.out, engine=args.engine, limit=args.limit, max_new=args.max_new)
    print(f"\n{table}")
    print("Rates with n and exact 95 % intervals; ASR max is the worst attack's. SmolLM2 rarely obeys an injection,")
    print("so this table shows that the machinery runs, not that a defense helps.\n")
    for step in steps:
        print(f"{step.seconds:7.1f} s  {step.name}")
    print(f"\nEverything is in {args.out}: prompts and responses in the samples_*.jsonl files.")
    return 0
