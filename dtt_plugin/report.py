"""One comparison table from lm-eval's own output folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dtt_plugin.errors import DttError


class Rate(NamedTuple):
    """A share of samples with its exact (Clopper-Pearson) 95 % interval."""

    hits: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[float]) -> Rate:
        """Count outcomes of 0 or 1."""
        from scipy.stats import binomtest

        hits, n = int(sum(outcomes)), len(outcomes)
        interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="exact")
        return cls(hits, n, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        """Return for instance `3/48 [1.3, 17.2] %`."""
        return f"{self.hits}/{self.n} [{100 * self.low:.1f}, {100 * self.high:.1f}] %"


class Row(NamedTuple):
    """What one run measured on one task."""

    defense: str
    rates: dict[str, Rate]
    """Per attack "hacked_<attack>", "hacked_max" (the worst attack's rate) and "refusal"."""


def read_run(folder: Path, task: str, defense: str) -> Row:
    """Read the newest samples of `task` below an lm-eval output folder.

    Raises:
        DttError: the folder holds no samples of that task.
    """
    files = sorted(folder.rglob(f"samples_{task}_2*.jsonl"))
    if not files:
        raise DttError(f"{folder} holds no samples of {task}; run lm_eval with --log_samples --output_path {folder}.")
    samples: list[dict[str, Any]] = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    names = [name for name in samples[0]["metrics"] if name.startswith("hacked_") or name == "refusal"]
    rates = {
        name: Rate.of([sample[name] for sample in samples])
        for name in names
        if not isinstance(samples[0][name], list) and name != "hacked_any"
    }
    attacks = [rate for name, rate in rates.items() if name != "refusal"]
    if attacks:
        rates["hacked_max"] = max(attacks, key=lambda rate: rate.hits)
    return Row(defense, rates)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; every rate stands with its n and its exact 95 % interval."""
    from pytablewriter import MarkdownTableWriter

    columns = list(dict.fromkeys(name for row in rows for name in row.rates))
    writer = MarkdownTableWriter(
        headers=["defense", *(name.replace("_", " ").replace("hacked", "ASR") for name in columns)],
        value_matrix=[[row.defense, *(str(row.rates.get(name, "")) for name in columns)] for row in rows],
        margin=1,
    )
    return str(writer.dumps())
