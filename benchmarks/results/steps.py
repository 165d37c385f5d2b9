"""Steps of the experiments as a user would run them, each skipped where its result is there already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results.kept import Kept
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.training_log import log_of

STEPS, BATCH, LABEL_TOKENS, HELD_OUT, EVERY = 50, 16, 32, 32, 25
SAVE_EVERY = 5
"""Steps that an interruption may cost; a checkpoint of a few rows is small."""
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "enforce_eager": True,
    "early_decision": True,
    "kv_cache_memory_bytes": 1 << 30,
}
"""Model arguments of every evaluation."""


def run(name: str, *command: str, to: Path | None = None) -> None:
    """Run a command of ours; `to` gets the last line that it prints."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    output = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE if to else None, text=True)
    if to:
        to.write_text(output.stdout.splitlines()[-1] + "\n", encoding="utf-8")


def train(kept: Kept, name: str, model: str, data: str, *, init: str = "random", seed: int = 0) -> Path:
    """Return `tokens/NAME.safetensors`, trained for a model where none is kept; goes on after an interruption."""
    out = Path(f"tokens/{name}.safetensors")
    if not out.is_file() and not kept.fetch_tokens(*of_training(out)):
        command = ["-c", "from dtt_plugin.cli import main; raise SystemExit(main())", "train", model, "--data", data]
        options = {"--out": out, "--init": init, "--seed": seed, "--steps": STEPS, "--batch": BATCH}
        options |= {"--label-tokens": LABEL_TOKENS, "--held-out": HELD_OUT}
        options |= {"--eval-every": EVERY, "--save-every": SAVE_EVERY}
        flat = [str(word) for pair in options.items() for word in pair]
        resume = ["--resume"] if Path(f"{out}.checkpoints/run.json").is_file() else []
        run(f"train {name}", *command, *flat, *resume)
        kept.keep_tokens(*of_training(out))
    return out


def half_way(tokens: Path) -> Path:
    """Return the file of the same training's tokens after `EVERY` steps."""
    return tokens.with_suffix(f".step-{EVERY}{tokens.suffix}")


def of_training(tokens: Path) -> tuple[Path, ...]:
    """Return what a training leaves: its tokens, those half-way and the log, which tells the cost."""
    return tokens, half_way(tokens), log_of(tokens)


def evaluate(kept: Kept, name: str, model: str, arms: list[str], files: list[Path], *, limit: int | None) -> None:
    """Run the evaluation of a model under prompt defenses and token files, and keep what it measured.

    Args:
        kept: where to.
        name: of the folder there.
        model: its folder.
        arms: defenses without tokens, for instance "none".
        files: of tokens.
        limit: records; None: all.

    Raises:
        DttError: a run failed; what the others measured is kept.
    """
    from dtt_plugin.sweep.file import read_sweep
    from dtt_plugin.sweep.run import run_sweep

    base: dict[str, Any] = {"models": [model], "prompt_format": "model"}
    grid = [base | {"defenses": arms}] if arms else []
    if files:
        grid.append(base | {"defenses": ["tokens"], "tokens": [str(file) for file in files]})
    content: dict[str, Any] = {"engine": "dtt_vllm", "model_args": ENGINE, "grid": grid}
    file = Path(f"{name}.json")  # JSON is YAML
    file.write_text(json.dumps(content | ({"limit": limit} if limit else {}), indent=1), encoding="utf-8")
    todo = [cell for cell in read_sweep(file) if not kept.is_there(name, cell)]
    failed = run_sweep(todo, Path(name)) if todo else []
    for cell in todo:
        if cell not in failed:
            kept.keep(name, cell, cell.folder(Path(name)))
    if failed:
        raise DttError(f"{name}: {', '.join(cell.name for cell in failed)} failed, see above.")
