"""Outcome files: what finished runs measured, without any text of prompts or responses, and without a path.

One file holds everything that tables, tests and intervals are made from, so that anybody can check or extend a
comparison on any machine. A digest over all of it stands inside: a changed figure shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard.identity import Identity
from dtt_plugin.leaderboard.labels import public_facts
from dtt_plugin.leaderboard.runs import MOST_FLOPS, AttackUsed, Floats, Outcomes, Run
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import all_printable, json_text

FORMAT = "dtt.outcomes/1"
ENDING = ".outcomes.json"
_NONE = "-"
"""Stands for a record that has no such outcome, among 0 and 1."""
_PLAIN = (
    "model", "defense", "method", "tokens_sha256", "task", "version", "prompt_format", "data_digest", "generation",
    "limited", "early_decision", "n", "seconds", "unfinished", "misread", "thoughts_cut", "prompts_digest", "stamp",
)  # fmt: skip
_COUNTS = ("n", "unfinished", "misread")
_FLAGS = ("limited", "early_decision", "thoughts_cut")
_MOST_RECORDS = 10_000_000


def write_outcomes(path: Path, runs: Sequence[Run]) -> None:
    """Write runs as one outcome file.

    Args:
        path: its name ends in `.outcomes.json`, by which folders are searched.
        runs: scored ones.

    Raises:
        DttError: another name, or the file can't be written.
    """
    if not path.name.endswith(ENDING):
        raise DttError(f"--export {path}: the name of an outcome file ends in {ENDING}; add that.")
    content = all_printable({"format": FORMAT, "runs": [_to_json(run) for run in runs]})
    with replacing(path) as temporary:
        temporary.write_text(json_text({**content, "digest": sha256_json(content)}) + "\n", encoding="utf-8")


def _to_json(run: Run) -> dict[str, Any]:
    identity = run.identity
    return {
        **{name: getattr(run, name) for name in _PLAIN},
        "model": public_name(run.model),
        "costs": run.costs,
        "attack": asdict(run.attack) if run.attack else None,
        "facts": public_facts(identity.facts),
        "circumstances": public_facts(identity.circumstances),
        "unknown": sorted(identity.unknown),
        "fingerprint": identity.fingerprint,
        "record_ids": list(run.record_ids),
        "clusters": None if run.clusters is None else run.clusters.tolist(),
        "outcomes": {name: _digits(run.values(name)) for name in run.outcomes},
        "measures": {name: _digits(values) for name, values in run.measures.items()},
    }


def _digits(values: Floats) -> str | list[float | None]:
    """Return 0, 1 and `-` for none, a character a record; a list where there are shares between."""
    known = values[~np.isnan(values)]
    if np.isin(known, (0, 1)).all():
        return "".join(_NONE if math.isnan(value) else str(int(value)) for value in values.tolist())
    return [None if math.isnan(value) else value for value in values.tolist()]


def is_outcome_file(content: Any) -> bool:
    """Return whether a JSON value says that it is one."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_outcomes(path: Path, content: dict[str, Any]) -> list[Run]:
    """Return the runs of an outcome file.

    Args:
        path: where it was read.
        content: its JSON.

    Raises:
        DttError: its digest is not that of its content, or it is not what it says.
    """
    rest = {name: value for name, value in content.items() if name != "digest"}
    if content.get("digest") != sha256_json(rest):
        raise DttError(f"{path} was changed after it was written (its digest is another); export the run again.")
    try:
        runs = [_from_json(path, entry) for entry in rest["runs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DttError(f"{path} says {FORMAT} and is none ({str(error)[:80]}); export the run again.") from error
    if not runs:
        raise DttError(f"{path} holds no run; export one.")
    return runs


def _from_json(path: Path, entry: dict[str, Any]) -> Run:
    """Raises: KeyError, TypeError, ValueError, AttributeError: it is not what `_to_json` made."""
    record_ids = tuple(entry["record_ids"])
    n = len(record_ids)
    _need(0 < n <= _MOST_RECORDS and n == entry["n"] and len(set(record_ids)) == n, "record_ids")
    _need(all(type(record) is int for record in record_ids), "record_ids")
    for name in _PLAIN:
        kind = int if name in _COUNTS else bool if name in _FLAGS else str
        known = type(entry[name]) is kind if name != "seconds" else _is_share_or_more(entry[name])
        _need(known, name)
    values = {name: _values(digits, n, name) for name, digits in entry["outcomes"].items()}
    whole = all(np.isin(column[~np.isnan(column)], (0, 1)).all() for column in values.values())
    _need(bool(values or entry["measures"]) and whole, "outcomes")
    missing = {name: np.isnan(column) for name, column in values.items()}
    _need(not any(column.all() for column in missing.values()), "outcomes")
    outcomes: dict[str, Outcomes] = {name: np.nan_to_num(column).astype(np.bool_) for name, column in values.items()}
    clusters = entry["clusters"]
    _need(clusters is None or (len(clusters) == n and all(type(c) is int for c in clusters)), "clusters")
    identity = Identity(
        _texts(entry["facts"]), _texts(entry["circumstances"]), frozenset(map(str, entry["unknown"])),
        str(entry["fingerprint"]),
    )  # fmt: skip
    return Run(
        path=path,
        samples=path,
        **{name: entry[name] for name in _PLAIN},
        record_ids=record_ids,
        outcomes=outcomes,
        made={name: ~column for name, column in missing.items() if column.any()},
        measures={name: _values(digits, n, name) for name, digits in entry["measures"].items()},
        clusters=None if clusters is None else np.array(clusters, np.int64),
        attack=_attack(entry["attack"], n),
        costs={str(name): float(cost) for name, cost in entry["costs"].items()},
        identity=identity,
    )


def _attack(told: Any, n: int) -> AttackUsed | None:
    if told is None:
        return None
    steps = tuple(told["steps"])
    _need(len(steps) in (0, n) and all(step is None or type(step) is int for step in steps), "attack")
    _need(all(isinstance(told[name], str) for name in ("name", "defense", "tokens_sha256")), "attack")
    _need(type(told["own"]) is bool and type(told["left_out"]) is int, "attack")
    budget, flops = told.get("budget_steps"), told.get("flops")
    _need(all(value is None or (type(value) is int and 0 <= value < MOST_FLOPS) for value in (budget, flops)), "attack")
    name, own, defense, digest = (told[name] for name in ("name", "own", "defense", "tokens_sha256"))
    return AttackUsed(name, own, defense, digest, steps, told["left_out"], budget, flops)


def _values(digits: Any, n: int, name: str) -> Floats:
    if isinstance(digits, str):
        _need(re.fullmatch(r"[01-]*", digits) is not None, name)
        digits = [None if digit == _NONE else int(digit) for digit in digits]
    _need(isinstance(digits, list) and len(digits) == n, name)
    _need(all(v is None or (_is_share_or_more(v) and v <= 1) for v in digits), name)
    return np.array([math.nan if value is None else value for value in digits], np.float64)


def _is_share_or_more(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value) and value >= 0)


def _texts(table: dict[str, Any]) -> dict[str, str]:
    _need(all(isinstance(value, str) for value in table.values()), "facts")
    return dict(table)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what!r:.40} is not what it should be")
