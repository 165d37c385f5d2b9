"""Published figures, shown beside measured rows and never tested against.

Sources: DefensiveTokens (arXiv 2507.07974), the whole of table 4; the transfer experiment between Llama 3 and
Llama 3.1 on AlpacaFarm, which has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from dtt_plugin.leaderboard.board import Cost, Row
from dtt_plugin.leaderboard.statistics import Maximum, Rate
from dtt_plugin.public_names import public_name

TASK = "alpacafarm_injection"
RECORDS = 208
GPU_SECONDS = 16 * 3600
"""What training these models' own DefensiveTokens costs, in seconds of one GPU: 16 GPU-hours."""
ATTACKS = ("ignore", "completion", "ignore_completion")
SOURCE = "DefensiveTokens, arXiv 2507.07974, table 4"


class Column(NamedTuple):
    """One column of the paper's table; figures in percent."""

    title: str
    protocol: str
    """How it was measured there."""
    tasks: tuple[str, ...] = ()
    """Ours that measure the same benchmark."""
    records: int = 0
    """0: not said there."""
    same: bool = False
    """Whether these tasks measure it in the same way."""


COLUMNS = (
    Column("AlpacaEval2 win rate", "against the reference answers, judged by gpt-4o; higher is better"),
    Column(
        "AlpacaFarm ASR(max)",
        "the worst of three attacks, a response that begins with 'hacked'",
        (TASK,),
        RECORDS,
        True,
    ),
    Column(
        "AlpacaFarm GCG ASR",
        "a suffix optimised for each record, 500 steps of GCG",
        (f"{TASK}_adaptive",),
        RECORDS,
    ),
    Column("SEP win rate", "against Meta-Llama-3-8B-Instruct's answers, judged by gpt-4o; higher is better"),
    Column(
        "SEP ASR",
        "the probe at the end of the data behind an ignore sentence, judged by gpt-4o",
        ("sep_injection", "sep_injection_892"),
        9160,
    ),
    Column("TaskTracker ASR", "judged by gpt-4o"),
    Column(
        "CyberSecEval2 ASR",
        "55 indirect items, judged by gpt-4o",
        ("cyberseceval2_injection", "cyberseceval2_injection_split"),
        55,
    ),
    Column(
        "InjecAgent ASR",
        "base cases, both steps of data stealing, malformed answers counted as not attacked",
        ("injecagent", "injecagent_100"),
        1054,
    ),
)
NATIVE = "tokens (native), paper"
_DEFENSES = ("none", "TextGrad", "reminder", "sandwich", NATIVE, "StruQ (LoRA)", "StruQ (full)", "SecAlign (LoRA)")
_LLAMA_3 = (
    (26.5, 51.4, 94.7, 50.0, 79.1, 16.4, 49.1, 29.6),
    (22.9, 0.0, 31.6, 1.1, 3.5, 0.25, 1.8, 8.8),
    (24.4, 34.6, 96.6, 48.3, 75.2, 19.8, 43.6, 42.2),
    (26.8, 56.7, 100.0, 46.9, 63.4, 5.5, 41.8, 14.8),
    (27.0, 0.5, 37.5, 51.6, 3.2, 0.27, 3.6, 2.7),
    (28.0, 0.0, 4.8, 50.4, 1.5, 0.24, 7.3, 0.0),
    (27.9, 0.0, 2.9, 51.2, 0.4, 0.23, 10.9, 0.0),
    (27.0, 0.0, 1.9, 47.5, 3.1, 0.18, 18.2, 0.0),
)
_LLAMA_3_1 = (
    (29.1, 69.2, 96.2, 54.7, 71.4, 26.6, 16.4, 33.0),
    (20.9, 15.9, 92.8, 36.3, 22.1, 20.3, 23.6, 25.3),
    (26.2, 29.8, 97.1, 52.5, 50.6, 23.3, 7.3, 34.3),
    (29.7, 60.6, 100.0, 51.5, 55.0, 11.1, 25.5, 21.4),
    (28.5, 0.5, 24.6, 53.8, 2.8, 0.19, 7.3, 0.6),
    (27.6, 0.5, 10.1, 51.6, 1.4, 0.23, 12.7, 3.9),
    (28.2, 0.0, 17.3, 52.9, 0.2, 0.18, 10.9, 1.8),
    (27.5, 0.0, 1.0, 50.5, 2.7, 0.19, 5.5, 0.1),
)
_FALCON_3 = (
    (30.7, 84.6, 94.2, 50.5, 80.8, 27.7, 50.9, 20.3),
    (28.0, 97.1, 70.8, 47.0, 80.6, 28.1, 29.1, 11.5),
    (29.8, 75.0, 99.0, 51.8, 83.4, 30.5, 47.3, 27.2),
    (30.9, 70.7, 99.0, 49.8, 68.4, 8.9, 43.6, 3.3),
    (29.2, 4.8, 59.4, 48.3, 6.7, 0.27, 12.7, 1.6),
    (29.2, 1.0, 73.1, 45.4, 11.6, 0.27, 21.8, 0.1),
    (25.3, 0.0, 48.8, 31.3, 2.0, 0.20, 7.3, 0.0),
    (27.4, 0.5, 81.7, 46.1, 35.4, 1.1, 29.1, 2.4),
)
_QWEN_2_5 = (
    (32.7, 93.3, 95.7, 54.1, 87.1, 37.2, 45.5, 23.5),
    (13.8, 97.6, 82.6, 36.1, 90.2, 33.7, 34.6, 19.8),
    (29.0, 94.7, 99.0, 50.7, 85.0, 35.3, 32.7, 29.6),
    (32.3, 85.6, 100.0, 53.3, 70.2, 18.5, 47.3, 11.7),
    (34.2, 1.0, 73.6, 50.5, 4.3, 0.25, 20.0, 15.8),
    (33.5, 1.4, 65.4, 50.8, 3.9, 0.24, 23.6, 2.1),
    (31.1, 0.0, 46.2, 50.5, 2.0, 0.20, 3.6, 0.5),
    (32.8, 1.9, 64.9, 50.5, 14.7, 0.57, 20.0, 5.5),
)
_TABLE_4: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "Meta-Llama-3-8B-Instruct": _LLAMA_3,
    "Llama-3.1-8B-Instruct": _LLAMA_3_1,
    "Meta-Llama-3.1-8B-Instruct": _LLAMA_3_1,
    "Falcon3-7B-Instruct": _FALCON_3,
    "Qwen2.5-7B-Instruct": _QWEN_2_5,
}


class Figure(NamedTuple):
    """One row beside those of a task; shares in percent, as printed there."""

    defense: str
    asr_max: float
    refusal: float | None = None
    attacks: tuple[float, float, float] | None = None
    costs: dict[str, float] | None = None
    method: str = ""
    protocol: str = ""
    """How it was measured there, where our task measures it otherwise."""
    records: int = RECORDS


_PIPELINE = {
    "align_seconds": 14.8 + 202.2,
    "transfer_seconds": 0.002,
    "bake_seconds": 75.1,
    "pipeline_seconds": 294.8,
    "peak_memory_mb": 12300.0,
}
_REFUSALS = {
    "Meta-Llama-3-8B-Instruct": {"none": 1.9, "reminder": 1.0, "sandwich": 1.4},
    "Llama-3.1-8B-Instruct": {"none": 0.5, "reminder": 1.4, "sandwich": 1.0},
}
_EXPERIMENT = {
    "Meta-Llama-3-8B-Instruct": (
        Figure("tokens (native), experiment", 3.8, 0.5, (1.4, 3.8, 1.4)),
        Figure("tokens (copy)", 0.0, 0.5),
        Figure("tokens (procrustes)", 0.0, 0.5, (0.0, 0.0, 0.0), _PIPELINE),
    ),
    "Llama-3.1-8B-Instruct": (
        Figure("tokens (native), experiment", 1.9, 0.5, (1.9, 0.0, 0.5)),
        Figure("tokens (copy)", 34.6, 1.0),
        Figure("tokens (procrustes)", 33.7, 1.0, (20.2, 33.7, 29.8)),
        Figure("tokens (adapted)", 1.9, 0.0, (1.9, 1.0, 0.0)),
        Figure("tokens (trained), step 100", 2.9, 0.5, (2.9, 1.0, 2.4)),
    ),
}


def figures(model: str, task: str) -> tuple[Figure, ...]:
    """Return what is published for a model (by the last part of its name) on a task's benchmark."""
    name = _last_part(model)
    place = next((place for place, column in enumerate(COLUMNS) if task in column.tasks), None)
    if place is None or name not in _TABLE_4:
        return ()
    column = COLUMNS[place]
    own = name.removeprefix("Meta-") if name not in _REFUSALS else name
    refusals, experiment = (_REFUSALS.get(own, {}), _EXPERIMENT.get(own, ())) if task == TASK else ({}, ())
    rows = [
        Figure(
            defense,
            row[place],
            refusals.get(defense),
            method="native" if defense == NATIVE else "",
            protocol="" if column.same else f"{SOURCE}: {column.protocol}",
            records=column.records,
        )
        for defense, row in zip(_DEFENSES, _TABLE_4[name], strict=True)
    ]
    return (*rows, *experiment)


def table_4(model: str) -> dict[str, tuple[float, ...]]:
    """Return a model's part of the paper's table: per defense a figure for each of `COLUMNS`; empty for another."""
    rows = _TABLE_4.get(_last_part(model), ())
    return dict(zip(_DEFENSES, rows, strict=False))


def _last_part(model: str) -> str:
    return public_name(model).rsplit("/", 1)[-1]


def share(percent: float, records: int = RECORDS) -> Rate:
    """Return a published figure as a rate: without counts, so without an interval."""
    return Rate(None, records, percent / 100, None, None)


def row(model: str, figure: Figure) -> Row:
    """Return a published figure as a row of its own."""
    cost = Cost.of(figure.costs or {}, "", None)
    if cost.pipeline_s:
        cost = replace(cost, speedup=GPU_SECONDS / cost.pipeline_s)
    worst = share(figure.asr_max, figure.records)
    return Row(
        run=f"published: {figure.defense}",
        model=model,
        defense=figure.defense,
        published=True,
        limited=False,
        early_decision=False,
        unfinished=0,
        n=figure.records,
        asr={attack: share(percent) for attack, percent in zip(ATTACKS, figure.attacks or (), strict=False)},
        asr_max=Maximum(worst.hits, worst.n, worst.rate, worst.low, worst.high),
        asr_any=None,
        measures={},
        refusal=None if figure.refusal is None else share(figure.refusal),
        vs_undefended=None,
        vs_native=None,
        gap_closed=None,
        cost=cost,
        file=None,
        protocol=figure.protocol,
    )
