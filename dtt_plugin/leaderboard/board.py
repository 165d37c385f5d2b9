"""What a comparison found, as data: every table, chart and file of the leaderboard is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dtt_plugin.leaderboard.statistics import Maximum, Rate
from dtt_plugin.tokens.methods import CONTROLS, MAPS

FORMAT = "dtt.leaderboard/1"


@dataclass(frozen=True)
class Test:
    """A row against a reference, on whether any attack worked on a record."""

    __test__ = False  # no test case of pytest's

    effect: float
    """Share of records: this row minus the reference."""
    p: float
    """Of McNemar's exact test."""
    p_holm: float
    """Adjusted over all tests of the table."""
    told_from_noise: bool


@dataclass(frozen=True)
class Ratio:
    """How much of the gap between the undefended model and native tokens a row closes: 0 none, 1 all of it."""

    value: float
    low: float | None
    high: float | None
    weak_native: bool = False
    """These native tokens are told apart from, and worse than, some row of the table."""


@dataclass(frozen=True)
class GapClosed:
    """A row's ratios."""

    ratios: Mapping[str, Ratio | None]
    """Against "measured" and "published" native tokens, as far as there are any; None where undefined."""
    undefended: str
    """Whether the undefended ASR is "measured" or "published"."""

    @property
    def defined(self) -> dict[str, Ratio]:
        """Those that are defined."""
        return {kind: ratio for kind, ratio in self.ratios.items() if ratio}


@dataclass(frozen=True)
class Cost:
    """What a row's tokens, checkpoint and evaluation cost, in seconds and MB of 10^6 bytes."""

    align_s: float | None = None
    transfer_s: float | None = None
    bake_s: float | None = None
    pipeline_s: float | None = None
    evaluation_s: float | None = None
    peak_memory_mb: float | None = None
    speedup: float | None = None
    """What training the model's own tokens costs over `pipeline_s`."""

    @classmethod
    def of(cls, costs: Mapping[str, float], method: str, evaluation: float | None) -> Cost:
        """Return what was recorded; what the tokens' making saves is only known beside the other rows."""
        align, transfer, bake = (costs.get(f"{step}_seconds") for step in ("align", "transfer", "bake"))
        pipeline = costs.get("pipeline_seconds")
        # A sum that lacks the alignment would flatter.
        complete = method in CONTROLS or (method in MAPS and align is not None)
        if pipeline is None and complete and transfer is not None:
            pipeline = sum(part for part in (align, transfer, bake) if part is not None)
        return cls(align, transfer, bake, pipeline, evaluation, costs.get("peak_memory_mb"))


@dataclass(frozen=True)
class Row:
    """One run, or one published figure."""

    run: str
    """Its label, unique among all rows."""
    model: str
    defense: str
    published: bool
    limited: bool
    """A part of the task's records."""
    early_decision: bool
    unfinished: int
    """Responses that never left their thoughts."""
    n: int
    """Records."""
    asr: Mapping[str, Rate]
    """Per attack."""
    asr_max: Maximum | None
    asr_any: Rate | None
    measures: Mapping[str, Rate]
    """What else the task measures, by its name there."""
    refusal: Rate | None
    vs_undefended: Test | None
    vs_native: Test | None
    gap_closed: GapClosed | None
    cost: Cost
    file: str | None
    protocol: str = ""
    """How a published figure was measured, where our task measures it otherwise."""
    arm: str = ""
    """The defense, with the digest of its tokens where the table has others of that name."""
    attack: str = ""
    """Of an adaptive task: method and budget, for instance "gcg@lite"."""
    attack_from: str = ""
    """The arm that a transferred attack was made on; "" for one made on this arm."""
    optimiser: tuple[tuple[int, float], ...] = ()
    """Of an attack that was made on this arm and these records: after how many steps which share of them was hit in the
    optimiser. The rate is the task's own."""

    @property
    def headline(self) -> Rate | None:
        """The one figure of a row: ASR(max), or where the attack was optimised, whether any attack worked."""
        return self.asr_any if self.attack else self.asr_max

    @property
    def ratios(self) -> dict[str, Ratio]:
        """The gap-closed ratios that are defined."""
        return self.gap_closed.defined if self.gap_closed else {}


@dataclass(frozen=True)
class Group:
    """A table: rows that may be compared."""

    title: str
    reason: str
    """What keeps it apart from the earlier table that it is most like."""
    n: int
    smallest_difference: float | None
    """That one test can separate, as a share of the records."""
    smallest_difference_holm: float | None
    """That is separated even where all other tests are noise."""
    tests: int
    discriminating: bool
    ranked: bool
    notes: tuple[str, ...]
    comparable: Mapping[str, str | int]
    """What its runs agree in."""
    rows: tuple[Row, ...]

    @property
    def attacks(self) -> list[str]:
        """The attacks of all rows, in order."""
        return list(dict.fromkeys(attack for row in self.rows for attack in row.asr))

    @property
    def measures(self) -> list[str]:
        """What else was measured of any row, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.measures))

    @property
    def is_adaptive(self) -> bool:
        """Whether its attacks were optimised, so that the headline is the worst of all attacks on a record."""
        return any(row.attack for row in self.rows)


@dataclass(frozen=True)
class Bound:
    """What vectors in a suffix's place reached in the optimiser: an upper bound on suffixes, no ASR."""

    model: str
    task: str
    arm: str
    tokens_sha256: str
    attack: str
    """Method and budget."""
    finished: bool
    n_records: int
    """Of the benchmark."""
    rate: Rate
    """Of the records that were tried."""
    curve: tuple[tuple[int, float], ...]
    """After how many steps which share of them was hit."""
    flops: int | None
    file: str


@dataclass(frozen=True)
class Cell:
    """An arm on one benchmark."""

    rate: Rate
    marks: tuple[str, ...]
    """What a reader has to know: not discriminating, incomplete."""


@dataclass(frozen=True)
class SuiteRow:
    """One arm."""

    arm: str
    benchmarks: Mapping[str, Cell]
    """By task; those that the arm was run on."""
    measures: Mapping[str, Cell]
    """By the name in `Suite.measures`."""


@dataclass(frozen=True)
class Suite:
    """A table over benchmarks: the arms of one model under one prompt format."""

    title: str
    benchmarks: tuple[str, ...]
    measures: Mapping[str, str]
    """Of each measure, the task that it is taken from: the one with the most records, or the one in its name."""
    rows: tuple[SuiteRow, ...]

    def untold_task(self, measure: str) -> str:
        """Return the task that a measure is taken from; "" where its name ends in it."""
        task = self.measures[measure]
        return "" if measure.endswith(task) else task


@dataclass(frozen=True)
class Leaderboard:
    """Tables, and what is said about all of them."""

    format: str
    method: Mapping[str, str | float]
    """How each figure is made, in words."""
    suites: tuple[Suite, ...]
    groups: tuple[Group, ...]
    problems: tuple[str, ...]
    files: tuple[str, ...]
    published: tuple[str, ...] = ()
    """Models whose part of the paper's table is shown beside the runs."""
    bounds: tuple[Bound, ...] = ()
    """Soft attacks on the arms."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of the leaderboard, see docs/leaderboard.md."""
        groups = [group_dict(group) for group in self.groups]
        suites = [asdict(suite) for suite in self.suites]
        return {
            **asdict(self),
            "suites": suites,
            "groups": groups,
            "problems": list(self.problems),
            "files": list(self.files),
        }


def group_dict(group: Group) -> dict[str, Any]:
    """Return the JSON of a table."""
    return {**asdict(group), "notes": list(group.notes), "rows": [row_dict(row) for row in group.rows]}


def row_dict(row: Row) -> dict[str, Any]:
    """Return the JSON of a row: the gap-closed ratios stand under their own names."""
    gap = row.gap_closed
    ratios = {kind: asdict(ratio) if ratio else None for kind, ratio in gap.ratios.items()} if gap else {}
    return {**asdict(row), "gap_closed": {**ratios, "undefended": gap.undefended} if gap else None}
