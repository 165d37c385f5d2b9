"""The main job on a small real model, from tokens of another model to one comparison table.

The source of the transfer is a *turned twin* of the demo model: the same
function, its hidden space rotated by a random orthogonal matrix. Its
DefensiveTokens are the shipped ones, turned along; the alignment has to find
the rotation from the two embedding matrices alone.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from dtt_plugin.alignment import align, save_alignment
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.data.records import ASSETS
from dtt_plugin.demo.model import demo_model
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard import tables
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.leaderboard.runs import Run, labelled
from dtt_plugin.tokens.files import load_tokens, save_tokens
from dtt_plugin.transfer.move import transfer
from dtt_plugin.transfer.twin import turn_tokens, write_twin

TASK = "injection_demo"
TOKENS = ASSETS / "smollm2-135m-instruct.tokens.safetensors"


class Step(NamedTuple):
    """A step of the demo and how long it took."""

    name: str
    seconds: float


def transferred_tokens(model: str, out: Path) -> Path:
    """Make the twin, align it to the demo model, transfer its tokens, and return the token file.

    Args:
        model: folder of the demo model.
        out: folder for the twin, the alignment and the tokens.
    """
    native = load_tokens(TOKENS)
    twin = out / "twin"
    rotation = write_twin(model, twin, seed=0, dtype="bfloat16")
    save_tokens(out / "twin.tokens.safetensors", turn_tokens(native, rotation, model=str(twin)))
    alignment = align(open_checkpoint(str(twin)), open_checkpoint(model))
    save_alignment(out / "alignment.safetensors", alignment)
    tokens = transfer(load_tokens(out / "twin.tokens.safetensors"), alignment)
    save_tokens(out / "transferred.tokens.safetensors", tokens)
    return out / "transferred.tokens.safetensors"


def evaluate(engine: str, model: str, defense: str, tokens: Path, out: Path, *, limit: int, max_new: int) -> Run:
    """Run one arm through the real `lm_eval` command, in a process of its own.

    Raises:
        DttError: lm_eval failed; its output has been shown.
    """
    arguments = f"pretrained={model},defense={defense},tokens={tokens}"
    if engine == "dtt_vllm":
        arguments += ",max_model_len=2048,enforce_eager=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", engine, "--model_args", arguments]
    command += ["--tasks", TASK, "--limit", str(limit), "--gen_kwargs", f"max_gen_toks={max_new}"]
    command += ["--log_samples", "--output_path", str(out / defense)]
    if engine == "dtt_hf":
        command += ["--batch_size", "8"]
    print("\n$", shlex.join(["lm_eval", *command[4:]]), flush=True)
    quieter = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    if subprocess.run(command, env=quieter, check=False).returncode:
        raise DttError(f"the arm {defense!r} failed, see above; `dtt doctor` checks the installation.")
    runs, problems = read_runs([out / defense])
    if not runs:
        raise DttError(problems[-1])
    return runs[-1]


def demo(out: Path, *, engine: str = "dtt_vllm", limit: int = 16, max_new: int = 64) -> tuple[str, list[Step]]:
    """Run the demo: transfer, then the model undefended, with reminder, sandwich and transferred tokens.

    Args:
        out: folder for everything it makes.
        engine: `dtt_vllm` or `dtt_hf`.
        limit: number of records, each with three attacks and the unharmed prompt.
        max_new: at most so many new tokens a response.

    Returns:
        The comparison table as Markdown, and the steps with their wall times in seconds.
    """
    steps: list[Step] = []

    def timed(name: str, start: float) -> None:
        steps.append(Step(name, time.perf_counter() - start))

    start = time.perf_counter()
    model = demo_model()
    timed("demo model", start)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    tokens = transferred_tokens(model, out)
    timed("twin, alignment, transfer", start)
    runs = []
    for defense in ("none", "reminder", "sandwich", "tokens"):
        start = time.perf_counter()
        runs.append(evaluate(engine, model, defense, tokens, out, limit=limit, max_new=max_new))
        timed(f"evaluation, {defense}", start)
    return tables.markdown(build(labelled(runs)).to_dict()), steps
