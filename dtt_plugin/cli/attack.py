"""`dtt attack`: suffixes optimised against an arm, to be evaluated by lm-eval."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.errors import DttError

if TYPE_CHECKING:
    from dtt_plugin.attack.options import AttackOptions

_EPILOG = """\
examples:
  dtt attack owner/model --tokens t.safetensors --method soft --records 0:32 --out soft.jsonl
  dtt attack owner/model --tokens t.safetensors --method universal --records 0:8 --out universal.jsonl
  dtt attack owner/model --tokens t.safetensors --records 0:24 --out gcg.jsonl
  dtt attack --import strings.txt --out others.jsonl
  lm_eval --model dtt_vllm --model_args pretrained=owner/model,tokens=t.safetensors,early_decision=true \\
          --tasks injection_demo_adaptive --metadata '{"attacks": "gcg.jsonl"}'
"""
_INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `attack` to the parser of `dtt`."""
    parser = subparsers.add_parser(
        "attack",
        help="attack an arm adaptively: suffixes optimised against it",
        description="White-box attacks on exactly the arm that is evaluated: tokens in front, its prompt defenses, its"
        " format. Each looks for a suffix behind the injected instruction that makes the response begin with what"
        " the rule reads. The rates come from lm-eval, which evaluates the file; nothing found within a budget does"
        " not mean that there is nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given has the default of AttackOptions
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", default="", help="folder or hub id of the undefended chat model")
    add("-o", "--out", required=True, type=Path, metavar="FILE", help="file of attacks to write (JSON lines)")
    add("--tokens", type=Path, metavar="FILE", help="token file; without it the undefended model is attacked")
    add("--tokens-model", metavar="NAME", help="which entry of an upstream JSON")
    add("--defense", metavar="NAME", help="as in the model arguments: none, tokens, reminder, tokens+sandwich, ...")
    add("--prompt-format", metavar="NAME", help="by default the token file's, or the model's own")
    add(
        "--task", metavar="NAME", help="injection_demo (default), alpacafarm_injection, or injection_records with --own"
    )
    add("--own", type=Path, metavar="FILE", help="your own records, see the task injection_records")
    add("--records", metavar="A:B", help="which records (default all); for universal the ones to make it on")
    add(
        "--method",
        metavar="NAME",
        help="gcg (default), universal, continuation, cancel, random-search, or soft (vectors, an upper bound)",
    )
    add(
        "--budget",
        metavar="NAME",
        help="lite (default): 64 candidates x 100 steps; medium: 128 x 200; paper: 512 x 500",
    )
    add("--steps", type=int, help="in place of the budget's")
    add("--start", metavar="NAME", help="what the suffix follows: naive (default), ignore, completion, ...")
    add("--along", type=Path, nargs="+", metavar="FILE", help="continuation: token files from weak to strong")
    add("--seed", type=int, help="default 0")
    add("--dtype", help="of the weights: auto (default), float32, bfloat16, float16")
    add("--positions-at-once", type=int, metavar="N", help="lower: less memory, same result")
    add(
        "--import",
        dest="strings",
        type=Path,
        metavar="FILE",
        help="optimise nothing: take others' strings, a text a line, for all records or one for each",
    )
    add("--resume", action="store_true", help="go on with an interrupted run")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Attack, print what was found."""
    from dtt_plugin.attack.options import AttackOptions
    from dtt_plugin.attack.run import attack

    names = {field.name for field in fields(AttackOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if "own" in given:
        given.setdefault("task", "injection_records")
    if "along" in given:
        given["along"] = tuple(given["along"])
    options = AttackOptions(**given)
    if "strings" in vars(args):
        return _import(args, options)
    if not options.model:
        raise DttError("dtt attack needs MODEL, the model to attack; only --import goes without.")
    done = attack(options, progress=True)
    file = done.file
    if not file.finished:
        print(f"dtt attack: stopped; {options.out} holds what was found, --resume goes on", file=sys.stderr)
        return _INTERRUPTED
    tried = file.search["hits"] if file.search else [bool(suffix.hit) for suffix in file.suffixes]
    report = {
        "attack": file.name,
        "records": len(tried),
        "hit in the optimiser": sum(tried),
        "suffixes written": sum(suffix.suffix is not None for suffix in file.suffixes),
        "flops": float(file.flops or 0),
        "seconds": done.seconds,
        "out": str(options.out),
    }
    show(report, as_json=args.json)
    return 0


def _import(args: argparse.Namespace, options: AttackOptions) -> int:
    from dtt_plugin.attack.importing import import_strings

    taken = import_strings(args.strings, options)
    broken = "not known without MODEL" if taken.broken is None else taken.broken
    report = {
        "suffixes": len(taken.file.suffixes),
        "with control tokens, to be broken": broken,
        "out": str(options.out),
    }
    show(report, as_json=args.json)
    return 0
