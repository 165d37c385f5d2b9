"""The evidence: real defenses on a real model, from training to docs/results.md.

    python -m benchmarks.results --model FOLDER --train FILE [--out out/results]

Every step is skipped where its result is there already, so a run that was interrupted goes on. When it ends, the
sections of docs/results.md whose measurements are complete are written anew; the others stay as they are. On two CPU
cores all of it takes about five hours, through vLLM's CPU build.

1. Native tokens: trained for the model, from random rows.
2. The model undefended, with prompt defenses, with native tokens, with random vectors of the same lengths.
3. A turned twin of the model (same function, hidden space rotated): tokens copied, rotated at random, transferred.
4. A drifted sibling (fine-tuned a little): tokens copied, transferred, adapted, and trained from a random start.
5. Learning curves of both starts on 64 records; log-likelihood of reference answers; multiple-choice tasks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import plan
from benchmarks.results.plan import MODEL, NATIVE, SIBLING, TWIN
from dtt_plugin.data.records import data_folder
from dtt_plugin.errors import DttError

ROOT = Path(__file__).parents[2]


def run(name: str, *command: str, to: Path | None = None) -> None:
    """Run a command of ours as a user would, and note what it took in `costs.json`."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    began = time.perf_counter()
    output = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE if to else None, text=True)
    if to:
        to.write_text(output.stdout.splitlines()[-1] + "\n", encoding="utf-8")
    note(name, time.perf_counter() - began, command)


def note(name: str, seconds: float, command: Sequence[str]) -> None:
    """Add a step's wall time, in seconds, to `costs.json`."""
    file = Path("costs.json")
    costs = json.loads(file.read_text()) if file.is_file() else {}
    costs[name] = {"seconds": round(seconds, 1), "command": " ".join(command)}
    file.write_text(json.dumps(costs, indent=1) + "\n")


def dtt(name: str, *arguments: str) -> None:
    run(name, "-c", "from dtt_plugin.cli import main; raise SystemExit(main())", *arguments)


def train(name: str, model: str, data: Path, *more: str, init: str = "random") -> None:
    """Train `tokens/NAME.safetensors` for a model, where it is not there yet; goes on after an interruption."""
    out = Path(f"tokens/{name}.safetensors")
    if out.is_file():
        return
    resume = ["--resume"] if Path(f"{out}.checkpoints/run.json").is_file() else []
    options = {"--steps": plan.STEPS, "--batch": plan.BATCH, "--label-tokens": plan.LABEL_TOKENS}
    options |= {"--held-out": plan.HELD_OUT, "--eval-every": plan.EVERY, "--save-every": plan.EVERY}
    flat = [str(word) for pair in options.items() for word in pair]
    dtt(f"train {name}", "train", model, "--data", str(data), "--out", str(out), "--init", init, *flat, *more, *resume)


def sweep(name: str, grid: list[dict[str, Any]], *, limit: int | None = None) -> None:
    """Run a grid into `NAME/`; cells that are finished are not run again."""
    from dtt_plugin.sweep.file import read_sweep
    from dtt_plugin.sweep.run import run_sweep

    file = Path(f"{name}.json")  # JSON is YAML
    content: dict[str, Any] = {"engine": "dtt_vllm", "model_args": plan.ENGINE, "grid": grid}
    file.write_text(json.dumps(content | ({"limit": limit} if limit else {}), indent=1))
    cells = read_sweep(file)
    began = time.perf_counter()
    if all(cell.is_finished(Path(name)) for cell in cells):
        return
    if failed := run_sweep(cells, Path(name)):
        raise DttError(f"sweep {name}: {', '.join(cell.name for cell in failed)} failed, see above.")
    note(f"sweep {name}", time.perf_counter() - began, ["dtt", "sweep", str(file)])


def moved(source: str, tokens: str, *methods: str) -> list[dict[str, Any]]:
    """Return entries of a grid's `tokens`: a file of `source` moved by each method."""
    return [{"transfer": {"source": source, "tokens": tokens, "method": method}} for method in methods]


def make_twin() -> None:
    from dtt_plugin.transfer.twin import write_twin

    if not Path(TWIN).exists():
        write_twin(MODEL, Path(TWIN), seed=1, dtype="float32")


def make_sibling(data: Path) -> None:
    if not Path("drift.json").is_file():
        run("drift", "-m", "benchmarks.results.drift", MODEL, str(data), SIBLING, to=Path("drift.json"))


def utility(kind: str, name: str) -> None:
    """Run `benchmarks.results.KIND` on the model, with the tokens that the plan names."""
    file = Path(f"{kind}-{name}.json")
    if not file.is_file():
        tokens = plan.UTILITY[name]
        more = ["--tokens", f"tokens/{tokens}.safetensors"] if tokens else []
        run(f"{kind} {name}", "-m", f"benchmarks.results.{kind}", MODEL, *more, to=file)


def transferred_to_sibling() -> str:
    """Return the native tokens' transfer to the sibling, as a file to adapt."""
    out = "tokens/transferred.safetensors"
    if not Path(out).is_file():
        dtt("align drifted", "align", MODEL, SIBLING, "--out", "drifted.alignment.safetensors")
        dtt("transfer drifted", "transfer", NATIVE, "drifted.alignment.safetensors", "-o", out)
    return out


def measure(data: Path) -> None:
    """Run all steps, the ones that the others build on first."""
    train("native", MODEL, data, "--stop-at", "0")
    base = {"models": [MODEL], "prompt_format": "model"}
    sweep("base", [base | {"defenses": ["none", "sandwich", "reminder"]}])
    with_tokens = base | {"defenses": ["tokens"]}
    sweep("base", [with_tokens | {"tokens": [NATIVE, *moved(MODEL, NATIVE, "random")]}])
    make_twin()
    twin = with_tokens | {"models": [TWIN]}
    sweep("twin", [twin | {"tokens": moved(MODEL, NATIVE, "procrustes", "copy", "random")}])
    make_sibling(data)
    start = transferred_to_sibling()
    train("adapted", SIBLING, data, init=start)
    train("from-random", SIBLING, data)
    sibling = with_tokens | {"models": [SIBLING]}
    sweep("drifted", [sibling | {"defenses": ["none"]}])
    trained = [f"tokens/{name}.safetensors" for name in plan.STARTS]
    sweep("drifted", [sibling | {"tokens": [start, *moved(MODEL, NATIVE, "copy"), *trained]}])
    curves = [f"tokens/{name}.step-{step}.safetensors" for step in plan.CURVE_STEPS for name in plan.STARTS]
    sweep("curves", [sibling | {"tokens": curves}], limit=plan.CURVE_RECORDS)
    for name in plan.UTILITY:
        for kind in plan.UTILITY_KINDS:
            utility(kind, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {plan.MODEL_NAME}")
    parser.add_argument("--train", type=Path, help="Alpaca records (default: alpaca_en_demo.json in the data folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "results")
    parser.add_argument("--page-only", action="store_true", help="write docs/results.md from what is there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    data = (args.train or data_folder() / "alpaca_en_demo.json").resolve()
    model = args.model.resolve()
    for folder in ("models", "tokens"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)  # short, relative names in every file that the runs write
    os.environ["PYTHONPATH"] = str(ROOT)
    if not Path(MODEL).exists():
        Path(MODEL).symlink_to(model)
    from benchmarks.results.page import write_page

    try:
        if not args.page_only:
            measure(data)
    finally:
        write_page(ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
