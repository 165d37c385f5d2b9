"""What the leaderboard's tables hold: cells as text, the same for every form in which they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from dtt_plugin.leaderboard import published
from dtt_plugin.leaderboard.board import Bound, Cell, Cost, Group, Leaderboard, Row, Suite
from dtt_plugin.leaderboard.suite import INCOMPLETE
from dtt_plugin.leaderboard.verdicts import verdict
from dtt_plugin.leaderboard.wording import (
    NOISE,
    NONE,
    UNDEFINED,
    cost_text,
    interval_text,
    percent,
    rate_text,
    ratio_text,
    test_text,
)
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import printable
from dtt_plugin.tasks.attacks import ADAPTIVE
from dtt_plugin.tasks.metrics import REFUSAL

COSTS = {
    "align_s": "alignment",
    "transfer_s": "transfer",
    "bake_s": "baking",
    "pipeline_s": "whole pipeline",
    "evaluation_s": "evaluation",
    "peak_memory_mb": "peak memory",
    "speedup": "speed-up",
}
"""The cost columns: their names in the JSON, and their titles."""
_LEGEND = (
    "Rates: hits/n and exact (Clopper-Pearson) 95 % intervals; ASR(max), the highest of the attacks' rates: {asr_max}. "
    "vs: difference in the share of records on which any attack worked; {tests}. "
    f"{NOISE}: cannot be told from noise (adjusted p of 5 % or more). "
    "Gap closed: (ASR(max) undefended - row) / (undefended - native), with a bootstrap interval; "
    f"{UNDEFINED} where the denominator cannot be told from zero. "
    "Speed-up: {speed-up}."
)
_Columns = dict[str, Callable[[Row], str]]
"""Per column its title, and what makes a row's cell."""


class Sheet(NamedTuple):
    """One table: a header and rows of cells as text, with what stands above and below."""

    title: str
    remarks: list[str]
    header: list[str]
    rows: list[list[str]]


def plain(text: object) -> str:
    """Return a name or text on one line, with control characters spelt out."""
    return " ".join(printable(str(text)).split())


def arm_name(row: Row, group: Group) -> str:
    """Return the row's label without what stands in the table's title."""
    name = plain(row.run)
    for part in plain(group.title).split(" · "):
        name = re.sub(rf" · {re.escape(part)}(?= · | #\d|$)", "", name)
    return name


def _name(row: Row, group: Group) -> str:
    """Return the row's name with its marks."""
    marks = ["limited"] * row.limited + ["early decision"] * row.early_decision
    marks += [f"{row.unfinished} unfinished"] if row.unfinished else []
    marks += ["other protocol"] if row.protocol else []
    return arm_name(row, group) + "".join(f" ({mark})" for mark in marks)


def sheets(board: Leaderboard) -> Iterator[Sheet]:
    """Yield tables that fit a page: across benchmarks, then for each group rates, tests and ratios, and costs."""
    for suite in board.suites:
        yield suite_sheet(suite)
    for group in board.groups:
        title, attacked = plain(group.title), bool(group.attacks)
        rates: _Columns = {f"ASR {plain(attack)}": partial(_asr, attack) for attack in group.attacks}
        if attacked:
            rates["ASR(max)"] = lambda row: rate_text(row.asr_max)
            rates[any_title(group)] = lambda row: rate_text(row.asr_any)
        rates["attack"] = lambda row: row.attack or NONE
        rates[REFUSAL] = lambda row: rate_text(row.refusal)
        measures: _Columns = {plain(name.replace("_", " ")): partial(_measure, name) for name in group.measures}
        if not attacked and all(row.refusal is None for row in group.rows):
            rates, measures = measures, {}
        yield from _sheet(group, title, remarks(group), rates, group.rows)
        if attacked:
            tests: _Columns = {
                "vs undefended": lambda row: test_text(row.vs_undefended),
                "vs native": lambda row: test_text(row.vs_native),
                "gap closed, measured": lambda row: ratio_text(row.gap_closed, "measured"),
                "gap closed, published": lambda row: ratio_text(row.gap_closed, "published"),
            }
            yield from _sheet(
                group, f"{title} · tests and ratios", [], tests, [r for r in group.rows if not r.published]
            )
        yield from _sheet(group, f"{title} · other measures", [], measures, group.rows)
        if matrix := attack_matrix(group):
            yield matrix
        costs: _Columns = {column: partial(_cost, name) for name, column in COSTS.items()}
        yield from _sheet(group, f"{title} · cost", [], costs, [row for row in group.rows if row.cost != Cost()])
    if board.bounds:
        yield bounds_sheet(board.bounds)
    for model in board.published:
        yield published_sheet(model)


def any_title(group: Group) -> str:
    """Return what the share of records is called on which any attack worked."""
    return "ASR(worst)" if group.is_adaptive else "ASR(any)"


def suite_sheet(suite: Suite) -> Sheet:
    """Return the table over benchmarks: the headline ASR of each, then one column per measure."""
    columns = {f"ASR {plain(task)}": [row.benchmarks.get(task) for row in suite.rows] for task in suite.benchmarks}
    columns |= {
        plain(f"{name} ({task})" if (task := suite.untold_task(name)) else name): [
            row.measures.get(name) for row in suite.rows
        ]
        for name in suite.measures
    }
    shared = {title: _shared_marks(cells) for title, cells in columns.items()}
    header = ["arm", *(f"{title}: {', '.join(marks)}" if (marks := shared[title]) else title for title in columns)]
    texts = [[cell_text(cell, shared[title]) for cell in cells] for title, cells in columns.items()]
    rows = [[plain(row.arm), *cells] for row, *cells in zip(suite.rows, *texts, strict=True)]
    remark = (
        "Each with its 95 % interval. ASR: the highest of a benchmark's attacks, or any attack where one was optimised."
        f" No average is made. {INCOMPLETE}: a part of the records, by --limit."
    )
    return Sheet(f"{plain(suite.title)} · all benchmarks", [remark], header, rows)


def _marks(cell: Cell) -> tuple[str, ...]:
    return (f"n = {cell.rate.n}", *cell.marks)


def _shared_marks(cells: Sequence[Cell | None]) -> list[str]:
    """Return what is to be said of all figures of a column."""
    known = [_marks(cell) for cell in cells if cell]
    return [mark for mark in known[0] if all(mark in marks for marks in known)] if known else []


def cell_text(cell: Cell | None, told: Sequence[str] = ()) -> str:
    """Return an arm's figure on one benchmark, with what the heading does not tell of it."""
    if cell is None:
        return NONE
    marks = [mark for mark in _marks(cell) if mark not in told]
    return f"{percent(cell.rate.rate)} %{interval_text(cell.rate)}" + (f" ({', '.join(marks)})" if marks else "")


def attack_matrix(group: Group) -> Sheet | None:
    """Return whether attacks move with tokens: suffixes made on one arm (row), evaluated on another (column)."""
    found = {(row.attack_from or row.arm, row.arm): row.asr[ADAPTIVE] for row in group.rows if row.attack}
    sources = list(dict.fromkeys(source for source, _ in found))
    if len(sources) < 2:
        return None
    evaluated = list(dict.fromkeys(arm for _, arm in found))
    rows = [[plain(source), *(rate_text(found.get((source, arm))) for arm in evaluated)] for source in sources]
    remark = (
        "Share of records that suffixes made on a row's arm hack on a column's arm: adaptive where the two are the"
        " same, a transferred attack elsewhere."
    )
    title = f"{plain(group.title)} · transfer of attacks"
    return Sheet(title, [remark], ["made on", *map(plain, evaluated)], rows)


BOUND_REMARK = (
    "Records on which vectors in a suffix's place hacked the model in the optimiser. Nothing can send them and lm-eval"
    " does not confirm them: an upper bound on what a suffix could do, not an ASR."
)


def bounds_sheet(bounds: Sequence[Bound]) -> Sheet:
    """Return what soft attacks reached, a row each."""
    rows = [
        [
            bound_name(bound),
            plain(bound.attack),
            rate_text(bound.rate),
            str(bound.n_records),
            NONE if bound.flops is None else f"{bound.flops:.1e}",
        ]
        for bound in bounds
    ]
    header = ["arm", "attack", "upper bound (optimiser)", "of the benchmark's records", "FLOPs"]
    return Sheet("Soft attacks", [BOUND_REMARK], header, rows)


def bound_name(bound: Bound) -> str:
    """Return a soft attack's arm, with its mark."""
    unfinished = "" if bound.finished else " (unfinished)"
    return plain(f"{bound.arm} · {bound.model} · {bound.task}{unfinished}")


def published_sheet(model: str) -> Sheet:
    """Return a model's part of the paper's table, each column with its protocol."""
    rows = [[defense, *(f"{value:g} %" for value in values)] for defense, values in published.table_4(model).items()]
    protocols = [
        f"{column.title}: {column.protocol}{'' if column.same else ' (other protocol)' if column.tasks else ''}."
        for column in published.COLUMNS
    ]
    header = ["defense", *(column.title for column in published.COLUMNS)]
    return Sheet(f"{plain(public_name(model))} · published: {published.SOURCE}", protocols, header, rows)


def _sheet(group: Group, title: str, remarks: list[str], columns: _Columns, rows: Sequence[Row]) -> Iterator[Sheet]:
    """Yield a table without the columns in which nothing is known, or none."""
    cells = {column: [cell(row) for row in rows] for column, cell in columns.items()}
    known = {column: texts for column, texts in cells.items() if set(texts) - {NONE}}
    if known or remarks:
        names = [_name(row, group) for row in rows]
        yield Sheet(title, remarks, ["run", *known], [list(row) for row in zip(names, *known.values(), strict=True)])


def _measure(name: str, row: Row) -> str:
    return rate_text(row.measures.get(name))


def _asr(attack: str, row: Row) -> str:
    return rate_text(row.asr.get(attack))


def _cost(name: str, row: Row) -> str:
    return cost_text(row.cost, name)


def remarks(group: Group) -> list[str]:
    """Return what has to be said about a table: its verdict, why it stands apart, its notes, what its n separates."""
    found = [plain(note) for note in (verdict(group), group.reason, *group.notes) if note]
    least, family = group.smallest_difference, group.smallest_difference_holm
    if least is None:
        found.append(f"n = {group.n}: too few records to separate any difference.")
    else:
        after = f"; {percent(family)} pp in this table's {group.tests} tests" if family and group.tests > 1 else ""
        found.append(f"n = {group.n}: the smallest difference that can be separated is {percent(least)} pp{after}.")
    protocols = dict.fromkeys(plain(row.protocol) for row in group.rows if row.protocol)
    found += [f"other protocol: {protocol}." for protocol in protocols]
    if any(row.limited for row in group.rows):
        found.append("limited: a run over a part of the records (--limit), for testing only.")
    if not group.ranked:
        found.append("Not ranked.")
    return found


def legend(board: Leaderboard) -> str:
    """Return what a reader has to know about the columns."""
    return _LEGEND.format(**board.method)
