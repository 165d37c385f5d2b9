"""`dtt train`: DefensiveTokens of one's own, or transferred ones adapted."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from dtt_plugin.cli.output import add_json_option, show

_EPILOG = """\
examples:
  dtt train owner/model --data records.json --out tokens.safetensors
  dtt train owner/model --data records.json --out adapted.safetensors --init moved.safetensors --steps 50
  dtt train owner/model --data records.json --out tokens.safetensors --resume
"""
_INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "train",
        help="train DefensiveTokens for a model, or adapt transferred ones",
        description="Prompt tuning with the StruQ loss: k rows in front of every prompt, all weights frozen, the loss"
        " on the response only; half of the examples clean, a quarter under the ignore attack, a quarter under the"
        " completion attack. Refuses training data that the evaluation uses.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given has the default of TrainingOptions
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub id of the undefended chat model")
    add("--data", required=True, metavar="FILE|ID", help="training records: JSON file, folder or hub id")
    add("-o", "--out", required=True, type=Path, metavar="FILE", help="token file to write")
    add("--init", metavar="random|text:TEXT|FILE", help="the start; a token file is adapted")
    add("--k", type=int, help="number of tokens (default 5)")
    add("--steps", type=int, help="optimiser steps (default: one pass over the records)")
    add("--batch", type=int, help="examples a step (default 16)")
    add("--rate", type=float, help="Adam's learning rate (default 0.1)")
    add("--seed", type=int, help="of the start, the order and the attacks (default 0)")
    add("--labels", metavar="self|data", help="the model's own answers (default), or the outputs")
    add("--label-tokens", type=int, help="cut labels at this many tokens (default 128)")
    add("--held-out", type=int, help="records that --eval-every keeps out of training (default 32)")
    add("--eval-every", type=int, metavar="N", help="measure held-out ASR, and keep the tokens, every N steps")
    add("--stop-at", type=float, metavar="SHARE", help="stop once the held-out ASR(max) is this low")
    add("--save-every", type=int, metavar="N", help="write a checkpoint every N steps (default 50)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--dtype", help="of the frozen weights: auto (default), float32, bfloat16, float16")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--tokens-at-once", type=int, help="positions a forward pass (default 512); lower: less memory")
    add("--report-to", metavar="NAME", help="trackio, wandb, ... (default none)")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, print the report."""
    from dtt_plugin.training.options import TrainingOptions

    names = {field.name for field in fields(TrainingOptions)}
    options = TrainingOptions(**{name: value for name, value in vars(args).items() if name in names})
    from dtt_plugin.training.processes import is_main
    from dtt_plugin.training.train import train

    trained = train(options)
    if not is_main():
        return 0
    if trained.tokens is None:
        print(f"dtt train: stopped after step {trained.steps}; go on with --resume", file=sys.stderr)
        return _INTERRUPTED
    norms = [float((row.astype(float) ** 2).sum() ** 0.5) for row in trained.tokens.rows]
    report = {
        "model": trained.tokens.model,
        "method": trained.tokens.method,
        "steps": trained.steps,
        "mean_loss": trained.loss,
        "seconds": trained.seconds,
        "norms": norms,
        "digest": trained.tokens.digest,
        "out": str(options.out),
        "log": str(options.log),
    }
    show(report, as_json=args.json)
    return 0
