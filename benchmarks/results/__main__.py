"""The evidence: the registered experiments of docs/experiments.md, and docs/results.md.

    python -m benchmarks.results --small FOLDER --large FOLDER [--only E1 ...] [--probe-only]
    python -m benchmarks.results --page-only

SMALL and LARGE are Qwen2.5-Coder-0.5B- and 1.5B-Instruct. The small model's own tokens are the ones that the package
ships. Every step is skipped where its result is there already, in --out or in docs/results/outcomes, so a run that was
interrupted goes on, on another machine as well. At the end, and with --page-only at once, docs/results.md is written
from docs/results/outcomes, whatever is there.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

from benchmarks.results.experiments import LARGE, SHORT, SMALL, Experiments
from benchmarks.results.kept import OUTCOMES, Kept
from benchmarks.results.page import EXPERIMENTS, NATIVE, write_page
from dtt_plugin.data.records import data_folder
from dtt_plugin.probe.run import SHIPPED_DATA

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, help="folder of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--large", type=Path, help="folder of Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--native", type=Path, default=NATIVE, help="the small model's own tokens")
    parser.add_argument("--data", default=SHIPPED_DATA, help="training records for tokens and probes")
    parser.add_argument("--drift-data", type=Path, default=data_folder() / "alpaca_en_demo.json")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "results", help="for what is not kept")
    parser.add_argument("--kept", type=Path, default=OUTCOMES, help="for what was measured; own models, data: another")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where results.md is written")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--probe-only", action="store_true", help="evaluate nothing")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    kept, docs = Kept(args.kept.resolve()), args.docs.resolve()
    try:
        if not args.page_only:
            _measure(parser, args, kept)
    finally:
        write_page(docs, kept)
    return 0


def _measure(parser: argparse.ArgumentParser, args: argparse.Namespace, kept: Kept) -> None:
    for folder in ("models", "tokens", "maps"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    models = {SMALL: args.small and args.small.resolve(), LARGE: args.large and args.large.resolve()}
    native, drift_data = args.native.resolve(), args.drift_data.resolve()
    os.chdir(args.out)  # short, relative names in every file that the runs write
    os.environ["PYTHONPATH"] = str(ROOT)
    for name, path in models.items():
        here = Path(name)
        if path and not here.exists():
            here.symlink_to(path)
        if not here.exists():
            parser.error(f"--{'small' if name == SMALL else 'large'} is needed: the folder of {here.name}")
    tokens = Path(f"tokens/native-{SHORT[SMALL]}.safetensors")
    if not tokens.exists():
        shutil.copy(native, tokens)
    experiments = Experiments(kept, args.data, drift_data, probe_only=args.probe_only)
    for name in args.only:
        getattr(experiments, name.lower())()


if __name__ == "__main__":
    sys.exit(main())
