"""Arms across benchmarks: one row an arm, one column a benchmark, then what the defense costs in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dtt_plugin.leaderboard.board import Cell, Group, Row, Suite, SuiteRow
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.leaderboard.utility import UTILITY
from dtt_plugin.public_names import public_name
from dtt_plugin.tasks.metrics import REFUSAL

MEASURES: Mapping[str, Callable[[Row], Rate | None]] = {
    "control": lambda row: row.measures.get("control"),
    "fidelity": lambda row: row.measures.get("processed"),
    "answered": lambda row: row.measures.get("answered"),
    "answered under attack": lambda row: row.measures.get("answered_under_attack"),
    REFUSAL: lambda row: row.refusal,
    "empty": lambda row: row.measures.get("empty"),
    "utility, GSM8K": lambda row: row.measures.get("exact_match"),
    "utility, IFEval": lambda row: row.measures.get("prompt_level_strict_acc"),
}
"""What stands behind the benchmarks' columns. Each is taken from one benchmark, no average is made; but a defense may
make a model deaf on one benchmark and not on the next, and a question's role matters: those are told of every one."""
_OF_EVERY_TASK = ("control", "utility, GSM8K", "utility, IFEval")
NOT_DISCRIMINATING, INCOMPLETE = "not discriminating", "incomplete"
# What a task decides, or how long its prompts are, or what a column's heading says: runs of one arm on two tasks may
# differ in it.
_OF_THE_TASK = {
    *("filters", "few-shot examples", "few-shot seed", "few-shot as turns", "attack", "prompt frame", "lone_user"),
    *("max_model_len", "max_length", "enforce_eager", "dtype"),
}


def suites(runs: Sequence[Run], groups: Sequence[Group]) -> tuple[Suite, ...]:
    """Return a table for each model that was run on two tasks or more."""
    found = {row.run: (group, row) for group in groups for row in group.rows if not row.published}
    alike: dict[object, list[Run]] = {}
    for run in runs:
        facts = frozenset(item for item in run.identity.facts.items() if item[0] not in _OF_THE_TASK)
        alike.setdefault((public_name(run.model), run.prompt_format, facts), []).append(run)
    return tuple(_suite(members, found) for members in alike.values() if len({run.task for run in members}) > 1)


def _suite(runs: Sequence[Run], found: Mapping[str, tuple[Group, Row]]) -> Suite:
    mixed = len({run.identity.facts.get("dtype") for run in runs}) > 1
    columns = {run.label: _column(run, mixed) for run in runs}
    tasks = list(dict.fromkeys(columns.values()))
    # Of two runs of one arm on one task the later one, as in the tables.
    arms: dict[tuple[str, str], dict[str, tuple[Group, Row]]] = {}
    for run in (run for run in runs if run.arm == run.defense):
        arms.setdefault((run.defense, run.tokens_sha256), {})[columns[run.label]] = found[run.label]
    sources: dict[str, tuple[str, str]] = {}  # of each column, the measure and the task
    for name, of_row in MEASURES.items():
        sizes = {
            task: row.n for tables in arms.values() for task, (_, row) in tables.items() if of_row(row) is not None
        }
        having = [task for task in tasks if task in sizes]
        if name in _OF_EVERY_TASK and len(having) > 1:
            sources |= {f"{name}, {task}": (name, task) for task in having}
        elif having:
            sources[name] = name, max(having, key=sizes.__getitem__)
    labels = _labels(list(arms))
    rows = []
    for arm, tables in arms.items():
        benchmarks = {task: _cell(*tables[task], tables[task][1].headline) for task in tasks if task in tables}
        measures = {
            column: _cell(*tables[task], MEASURES[name](tables[task][1]))
            for column, (name, task) in sources.items()
            if task in tables
        }
        known = {task: cell for task, cell in benchmarks.items() if cell}
        rows.append(SuiteRow(labels[arm], known, {name: cell for name, cell in measures.items() if cell}))
    attacked = tuple(task for task in tasks if any(task in row.benchmarks for row in rows))
    first = runs[0]
    title = " · ".join(part for part in first.title.split(" · ") if part != first.task)
    return Suite(title, attacked, {column: task for column, (_, task) in sources.items()}, tuple(rows))


def _column(run: Run, mixed: bool) -> str:
    """Return a run's task, with what sets it apart: an optimised attack, a question's unusual role, its dtype."""
    role = run.identity.facts.get("lone_user") if run.task in UTILITY else None
    more = [run.attack.name] if run.attack else [f"lone_user={role}"] if role else []
    dtype = [str(run.identity.facts.get("dtype") or "dtype unknown")] if mixed else []
    return ", ".join([run.task, *more, *dtype])


def _cell(group: Group, row: Row, rate: Rate | None) -> Cell | None:
    if rate is None:
        return None
    marks = (NOT_DISCRIMINATING,) * (not group.discriminating) + (INCOMPLETE,) * row.limited
    return Cell(rate, marks)


def _labels(arms: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the arms' names; tokens of one name are told apart by their digest."""
    names = [defense for defense, _ in arms]
    return {arm: arm[0] if names.count(arm[0]) == 1 else f"{arm[0]} {arm[1][:8]}".rstrip() for arm in arms}
