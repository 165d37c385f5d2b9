"""What a defense costs in use: lm-eval's own tasks, as `utility_gsm8k` and `utility_ifeval` run them, read as runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.runs import Floats, Response, Run
from dtt_plugin.leaderboard.untrusted import as_text, load_json, read_file


class Metric(NamedTuple):
    """The figure that stands for a task."""

    name: str
    filter: str


UTILITY: Mapping[str, Metric] = {
    # Chat models rarely write "The answer is", which the other filter wants.
    "utility_gsm8k": Metric("exact_match", "flexible-extract"),
    "utility_ifeval": Metric("prompt_level_strict_acc", "none"),
}


class Answers(NamedTuple):
    """What a samples file tells."""

    samples: list[dict[str, Any]]
    """One line a document, in the file's order."""
    hashes: str
    """Of all lines, in order, as lm-eval's own digest over the task joins them."""
    correct: Floats
    """(n,), 0 or 1, by document."""


def read_answers(path: Path, task: str) -> Answers:
    """Read the samples of a utility task, by document.

    Raises:
        DttError: a line is no sample, or its figure no 0 or 1.
    """
    metric = UTILITY[task]
    lines = [load_json(line, f"{path}, line {n},") for n, line in enumerate(read_file(path).splitlines(), 1) if line]
    parts = ("doc_hash", "prompt_hash", "target_hash")
    hashes = "".join(as_text(line.get(part)) for line in lines if isinstance(line, dict) for part in parts)
    samples = [line for line in lines if isinstance(line, dict) and line.get("filter") == metric.filter]
    ids = [sample.get("doc_id") for sample in samples]
    known = all(type(number) is int and 0 <= number < 2**31 for number in ids) and len(set(ids)) == len(ids)
    values = [sample.get(metric.name) for sample in samples]
    if not samples or not known or not all(type(v) in (bool, int, float) and v in (0, 1) for v in values):
        raise DttError(f"{path} has no {metric.name} of 0 or 1 for each document; run lm-eval again.")
    order = sorted(range(len(samples)), key=lambda place: samples[place]["doc_id"])
    return Answers([samples[i] for i in order], hashes, np.array([values[i] for i in order], np.float64))


def no_responses(run: Run) -> list[Response]:
    """Say that nothing was attacked.

    Raises:
        DttError: always.
    """
    raise DttError(f"{run.path}: {run.task} attacks nothing, so it has no responses to look at here; leave it out.")
