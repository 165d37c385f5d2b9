"""The main job on a small real model, from the undefended model to transferred tokens, in one table.

The target of the transfer is a *turned twin* of the demo model: the same
function, its hidden space rotated by a random orthogonal matrix. Tokens that
are copied to it mean nothing there; the alignment has to find the rotation
from the two embedding matrices alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.demo.model import MODELS, demo_model, origin_of_weights
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import write_json
from dtt_plugin.leaderboard import statistics
from dtt_plugin.leaderboard.board import Leaderboard, Row
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.labels import labelled
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.leaderboard.page import write_report
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.leaderboard.wording import interval_text, p_text, percent
from dtt_plugin.progress import Steps
from dtt_plugin.quiet import Event, run_quietly
from dtt_plugin.sweep.file import read_sweep
from dtt_plugin.sweep.run import LOG, run_sweep
from dtt_plugin.transfer.twin import write_twin

TASK = "injection_demo"
REPORT = "report.html"
# In the order of the sweep's cells.
NONE, REMINDER, SANDWICH, NATIVE, COPIED, MOVED = ARMS = (
    "undefended",
    "reminder",
    "sandwich",
    "trained tokens",
    "twin, tokens copied",
    "twin, tokens transferred",
)
_BAR = 24


@dataclass(frozen=True)
class Outcome:
    """What the demo measured."""

    rows: Mapping[str, Row]
    """Per arm, the leaderboard's row."""
    discriminating: bool
    """Whether the undefended model obeys injections often enough for a defense to show."""
    p: Mapping[str, float]
    """Per arm, of the exact McNemar test against the undefended model, whether any attack worked; not adjusted."""

    def helps(self, arm: str) -> bool:
        """Return whether fewer records fall than undefended, told apart from noise."""
        before, after = self.rows[NONE].asr_any, self.rows[arm].asr_any
        return bool(before and after and after.rate < before.rate) and self.p[arm] < statistics.ALPHA

    @property
    def shows_the_defense(self) -> bool:
        """Whether the demo shows what it is for."""
        return self.discriminating and self.helps(NATIVE)


def demo(
    out: Path, *, model: str, engine: str = "dtt_vllm", limit: int = 14, max_new: int = 32, verbose: bool = False
) -> Outcome:
    """Run the demo: the model undefended, under each defense, and its twin with copied and transferred tokens.

    Args:
        out: folder for everything it makes; arms that are finished there are not run again.
        model: one of `dtt_plugin.demo.model.MODELS`.
        engine: `dtt_vllm` or `dtt_hf`.
        limit: number of records, each with three attacks and the unharmed prompt.
        max_new: at most so many new tokens a response.
        verbose: leave what engines and libraries print on the terminal.

    Raises:
        DttError: an arm failed.
    """
    steps, log = Steps(), None if verbose else out / LOG
    out.mkdir(parents=True, exist_ok=True)
    steps.begin("model")
    run_quietly("dtt_plugin.demo.model", {"name": model}, log=log, listen=steps.hear)
    folder = demo_model(model)
    steps.end(f"{MODELS[model].hub_id}, {origin_of_weights(folder)}")
    twin = out / f"twin-{Path(folder).name}"
    if not twin.is_dir():
        steps.begin("turned twin")
        write_twin(folder, twin, seed=0, dtype="bfloat16")
        steps.end("the same function in a rotated hidden space")
    file = out / "sweep.yaml"
    write_json(file, _sweep(folder, twin.resolve(), MODELS[model].tokens, engine, limit, max_new))
    cells = read_sweep(file)  # JSON is YAML
    names = {cell.name: arm for cell, arm in zip(cells, ARMS, strict=True)}

    def hear(event: Event) -> None:
        if "warning" not in event:  # those stand in the log
            steps.hear(event | {"step": names.get(event["step"], event["step"])} if "step" in event else event)

    failed = run_sweep(cells, out, verbose=verbose, listen=hear)
    steps.end()
    if failed:
        lost = ", ".join(names[cell.name] for cell in failed)
        raise DttError(f"{lost}: could not be run, see above; `dtt doctor` checks the installation.")
    runs = labelled([read_run(cell.folder(out)) for cell in cells])
    board = build(runs)
    write_report(out / REPORT, board, runs)
    return outcome(runs, board)


def _sweep(model: str, twin: Path, tokens: Path, engine: str, limit: int, max_new: int) -> dict[str, Any]:
    """Return the demo as a sweep file."""
    # 56 short prompts at most; what vLLM takes by itself is memory that a laptop misses.
    of_engine: dict[str, Any] = {"max_model_len": 2048, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    if engine == "dtt_hf":
        of_engine = {"max_length": 2048}
    moved = {"source": model, "tokens": str(tokens)}
    return {
        "engine": engine,
        "task": TASK,
        "limit": limit,
        "gen_kwargs": {"max_gen_toks": max_new},
        **({"batch_size": 8} if engine == "dtt_hf" else {}),
        "model_args": {"early_decision": True, **of_engine},
        "grid": [
            {"models": [model], "defenses": ["none", "reminder", "sandwich", "tokens"], "tokens": [str(tokens)]},
            {
                "models": [str(twin)],
                "defenses": ["tokens"],
                "tokens": [{"transfer": {**moved, "method": method}} for method in ("copy", "procrustes")],
            },
        ],
    }


def outcome(runs: Sequence[Run], board: Leaderboard) -> Outcome:
    """Return what `runs`, one for each of `ARMS`, measured.

    Args:
        runs: in the order of `ARMS`.
        board: the leaderboard of them.
    """
    by_file = {row.file: (row, group) for group in board.groups for row in group.rows}
    rows = {arm: by_file[str(run.path)][0] for arm, run in zip(ARMS, runs, strict=True)}
    undefended = runs[0]
    p = {arm: statistics.mcnemar(undefended.hacked_any, run.hacked_any)[1] for arm, run in zip(ARMS, runs, strict=True)}
    return Outcome(rows, by_file[str(undefended.path)][1].discriminating, p)


# What is printed ------------------------------------------------------------------------------------


def table(outcome: Outcome) -> str:
    """Return one line an arm: ASR(max) with a bar and its interval, refusals, n."""
    lines = [f"{'':<26}{'ASR(max), 95 % interval':<{_BAR + 27}}refusal     n"]
    for arm, row in outcome.rows.items():
        asr, refusal = row.asr_max, row.refusal
        assert asr is not None
        assert refusal is not None  # the task has attacks and benign prompts
        bar = "█" * round(_BAR * asr.rate)
        lines.append(
            f"{arm:<26}{bar:<{_BAR}} {percent(asr.rate):>5} % {interval_text(asr):<16} {percent(refusal.rate):>6} %"
            f"  {row.n:>4}"
        )
    return "\n".join(lines)


def sentences(outcome: Outcome) -> list[str]:
    """Return what the table says and what it does not, in three sentences."""
    hits = {arm: f"{row.asr_max.hits} of {row.n}" for arm, row in outcome.rows.items() if row.asr_max}
    refusals = {arm: row.refusal.hits for arm, row in outcome.rows.items() if row.refusal}
    first = (
        f"Undefended, the worst of three attacks makes the model obey the injected instruction on {hits[NONE]} records;"
        f" Reminder leaves {hits[REMINDER]}, Sandwich {hits[SANDWICH]}."
    )
    if not outcome.discriminating:
        return [f"{first} That is too seldom for a defense to show: this table says nothing about the tokens."]
    helped = "The trained tokens" if outcome.helps(NATIVE) else "The trained tokens do not help here: they"
    second = (
        f"{helped} leave {hits[NATIVE]} ({p_text(outcome.p[NATIVE])}, exact McNemar on any attack), and refusals of"
        f" harmless prompts go from {refusals[NONE]} to {refusals[NATIVE]}."
    )
    found = {(False, True): "the alignment found the rotation", (False, False): "the transfer did not work"}
    verdict = found.get((outcome.helps(COPIED), outcome.helps(MOVED)), "even copied tokens help, which is unexpected")
    third = (
        f"On the twin, whose hidden space is rotated, copied tokens leave {hits[COPIED]} and transferred ones"
        f" {hits[MOVED]}: {verdict}; transfer between different models and attackers who adapt are not tested here."
    )
    return [first, second, third]
