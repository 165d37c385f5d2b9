"""Published figures, shown beside measured rows and never tested against.

Sources: DefensiveTokens (arXiv 2507.07974), table 4, AlpacaFarm's ASR(max) of the four models under None, Reminder,
Sandwich and DefensiveToken; the transfer experiment between Llama 3 and Llama 3.1, which has the rest. Both on the
task `alpacafarm_injection` with its 208 records.
"""

from __future__ import annotations

from typing import NamedTuple

from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.public_names import public_name

TASK = "alpacafarm_injection"
RECORDS = 208
GPU_SECONDS = 16 * 3600
"""What training these models' own DefensiveTokens costs, in seconds of one GPU: 16 GPU-hours."""
ATTACKS = ("ignore", "completion", "ignore_completion")


class Figure(NamedTuple):
    """One row; shares in percent, as printed there."""

    defense: str
    asr_max: float
    refusal: float | None
    attacks: tuple[float, float, float] | None = None
    costs: dict[str, float] | None = None
    method: str = ""


_PIPELINE = {
    "align_seconds": 14.8 + 202.2,
    "transfer_seconds": 0.002,
    "bake_seconds": 75.1,
    "pipeline_seconds": 294.8,
    "peak_memory_mb": 12300.0,
}
LLAMA_3 = (
    Figure("none", 51.4, 1.9),
    Figure("reminder", 34.6, 1.0),
    Figure("sandwich", 56.7, 1.4),
    Figure("tokens (native), paper", 0.5, None, method="native"),
    Figure("tokens (native), experiment", 3.8, 0.5, (1.4, 3.8, 1.4)),
    Figure("tokens (copy)", 0.0, 0.5),
    Figure("tokens (procrustes)", 0.0, 0.5, (0.0, 0.0, 0.0), _PIPELINE),
)
LLAMA_3_1 = (
    Figure("none", 69.2, 0.5),
    Figure("reminder", 29.8, 1.4),
    Figure("sandwich", 60.6, 1.0),
    Figure("tokens (native), paper", 0.5, None, method="native"),
    Figure("tokens (native), experiment", 1.9, 0.5, (1.9, 0.0, 0.5)),
    Figure("tokens (copy)", 34.6, 1.0),
    Figure("tokens (procrustes)", 33.7, 1.0, (20.2, 33.7, 29.8)),
    Figure("tokens (adapted)", 1.9, 0.0, (1.9, 1.0, 0.0)),
    Figure("tokens (trained), step 100", 2.9, 0.5, (2.9, 1.0, 2.4)),
)
FALCON_3 = (
    Figure("none", 84.6, None),
    Figure("reminder", 75.0, None),
    Figure("sandwich", 70.7, None),
    Figure("tokens (native), paper", 4.8, None, method="native"),
)
QWEN_2_5 = (
    Figure("none", 93.3, None),
    Figure("reminder", 94.7, None),
    Figure("sandwich", 85.6, None),
    Figure("tokens (native), paper", 1.0, None, method="native"),
)
_MODELS = {
    "Meta-Llama-3-8B-Instruct": LLAMA_3,
    "Llama-3.1-8B-Instruct": LLAMA_3_1,
    "Meta-Llama-3.1-8B-Instruct": LLAMA_3_1,
    "Falcon3-7B-Instruct": FALCON_3,
    "Qwen2.5-7B-Instruct": QWEN_2_5,
}


def figures(model: str, task: str) -> tuple[Figure, ...]:
    """Return what is published for a model (by the last part of its name) on a task."""
    return _MODELS.get(public_name(model).rsplit("/", 1)[-1], ()) if task == TASK else ()


def share(percent: float) -> Rate:
    """Return a published figure as a rate: without counts, so without an interval."""
    return Rate(None, RECORDS, percent / 100, None, None)
