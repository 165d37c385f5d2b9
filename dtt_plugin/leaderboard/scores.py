"""What the metrics in a samples file say of its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.runs import Floats, Ints, Outcomes
from dtt_plugin.leaderboard.samples import is_described, kind_of, read_response, variant_names
from dtt_plugin.leaderboard.untrusted import as_list, as_text
from dtt_plugin.tasks.description import ATTACK, BENIGN
from dtt_plugin.tasks.metrics import FOLLOWED, REFUSAL, followed_under, is_hacked, is_refusal, process_results

# Metrics that follow from the attacks' outcomes, or that a run tells in words.
_TOLD_OTHERWISE = (FOLLOWED, *map(followed_under, ("max", "any", "worst")), "unfinished", "bypass")
_STANDARD_ERROR = "_clustered_stderr"


def thoughts(samples: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcomes], cut: bool) -> tuple[int, int]:
    """Return how many responses have no answer, and how many were scored by their thoughts."""
    unfinished = misread = 0
    for place, sample in enumerate(samples):
        for index, name in enumerate(variant_names(sample)):
            _, reading = read_response(sample, index, cut)
            unfinished += reading.answer is None
            if reading.thought and not is_described(sample):  # those were never scored otherwise
                hit = is_refusal(reading.answer or "") if name == BENIGN else is_hacked(reading.answer or "")
                misread += bool(hit != outcomes[REFUSAL if name == BENIGN else name][place])
    return unfinished, misread


def scored_by_rules(path: Path, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples with what the task's own rules say of the responses.

    Raises:
        DttError: a rule can't be applied.
    """
    try:
        found = [process_results(s["doc"], [as_text(text) for text in s["filtered_resps"]]) for s in samples]
        return [s | scores | {"metrics": list(scores)} for s, scores in zip(samples, found, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DttError(f"{path}: its records can't be scored by their rules; run lm-eval again.") from error


class Scores(NamedTuple):
    """What a task's own metrics say of its records, see `Run`."""

    outcomes: dict[str, Outcomes]
    made: dict[str, Outcomes]
    measures: dict[str, Floats]


def read_scores(path: Path, samples: Sequence[Mapping[str, Any]]) -> Scores:
    """Read the metrics that are logged with the samples.

    Raises:
        DttError: one is no share, or no 0 or 1 where there is a single response.
    """
    kinds = {v["attack"]: kind_of(v) for sample in samples for v in sample["doc"]["variants"]}
    attacks = [name for name, kind in kinds.items() if kind == ATTACK]
    described = is_described(samples[0])
    columns = {a: followed_under(a) if described or len(attacks) > 1 else FOLLOWED for a in attacks}
    if BENIGN in kinds.values():
        columns[REFUSAL] = REFUSAL
    outcomes: dict[str, Outcomes] = {}
    made: dict[str, Outcomes] = {}
    for name, metric in columns.items():
        values = _column(path, metric, samples, whole=True)
        missing = np.isnan(values)
        if missing.all() or (missing.any() and not described):
            raise DttError(f"{path}: {metric} is not 0 or 1 in every sample; run lm-eval again.")
        outcomes[name] = np.nan_to_num(values).astype(np.bool_)
        if missing.any():
            made[name] = ~missing
    others = {name: None for s in samples if described for name in as_list(s.get("metrics")) if isinstance(name, str)}
    told = {*columns.values(), *_TOLD_OTHERWISE}
    names = [name for name in others if name not in told and not name.endswith(_STANDARD_ERROR)]
    measures = {name: _column(path, name, samples, whole=False) for name in names}
    return Scores(outcomes, made, {name: values for name, values in measures.items() if not np.isnan(values).all()})


def _column(path: Path, metric: str, samples: Sequence[Mapping[str, Any]], *, whole: bool) -> Floats:
    """Return a metric, (n,), NaN where a sample has none."""
    values = [sample.get(metric, math.nan) for sample in samples]
    values = values if whole else list(map(_share, values))
    known = [value for value in values if value is not math.nan]
    if whole and not all(type(value) in (int, float) and value in (0, 1) for value in known):
        raise DttError(f"{path}: {metric} is not 0 or 1 in every sample; run lm-eval again.")
    if not all(type(value) in (int, float) and 0 <= value <= 1 for value in known):
        raise DttError(f"{path}: {metric} is not a share from 0 to 1 in every sample; run lm-eval again.")
    return np.array(values, np.float64)


def _share(value: Any) -> Any:
    """Return the share that a list of counts tells, NaN where it is of none; anything else as it is.

    A pair is what was found, of how many. Four counts belong to rates over two runs, which no sample tells alone.
    """
    match value:
        case [int(found), int(of)] if 0 <= found <= of:
            return found / of if of else math.nan
        case [int(), int(), int(), int()]:
            return math.nan
    return value


def clusters_of(samples: Sequence[Mapping[str, Any]]) -> Ints | None:
    """Return the number of each record's cluster, (n,), where records share some; a record of none is its own."""
    names = [as_text(sample["doc"].get("cluster")) or f"\0{place}" for place, sample in enumerate(samples)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64) if len(numbers) < len(samples) else None
