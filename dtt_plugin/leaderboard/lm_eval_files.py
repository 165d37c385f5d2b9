"""lm-eval's output folders, read as runs.

Nothing in such a file is trusted: a file that is not what it should be becomes one
sentence among the problems, and the other files are read all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.board import Bound
from dtt_plugin.leaderboard.bounds import ENDING as ATTACKS_ENDING
from dtt_plugin.leaderboard.bounds import read_bound
from dtt_plugin.leaderboard.labels import labelled
from dtt_plugin.leaderboard.outcome_files import ENDING
from dtt_plugin.leaderboard.results_file import RESULTS_NAME, read_results
from dtt_plugin.leaderboard.runs import Run

_SAMPLES_NAME = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.\-]+)\.jsonl")


def read_runs(
    paths: Iterable[Path], *, unscored: bool = False, bounds: list[Bound] | None = None
) -> tuple[list[Run], list[str]]:
    """Read every run in `paths`: results, samples and outcome files, or folders that hold some at any depth.

    Args:
        paths: them.
        unscored: read runs with `--predict_only`, too, whose responses have no logged outcomes.
        bounds: where files of soft attacks go, if they are wanted.

    Returns:
        The runs, the earliest first (by the time in their files' names), each with a label of its own; and
        one sentence for each thing that could not be read.
    """
    runs: list[Run] = []
    problems: list[str] = []
    for path in _results_files(paths, problems):
        try:
            if _is_attacks(path):
                if bounds is not None:
                    bounds.append(read_bound(path))
                continue
            runs += read_results(path, problems, unscored)
        except DttError as error:
            problems.append(str(error))
        except RecursionError:
            problems.append(f"{path} is nested too deeply to be lm-eval's; restore it or run lm-eval again.")
    return labelled(sorted(runs, key=lambda run: run.stamp)), problems


def read_run(path: Path, *, unscored: bool = False) -> Run:
    """Read the one run in `path`, see `read_runs`.

    Raises:
        DttError: there is none, or more than one, or something there can't be read: a gate must not pass
            because the run that it is about was left out.
    """
    runs, problems = read_runs([path], unscored=unscored)
    if problems:
        raise DttError(problems[0])
    if not runs:
        raise DttError(f"{path} holds attacks, and no run that was evaluated under them; give lm-eval's output.")
    if len(runs) > 1:
        labels = ", ".join(f"{run.path} ({run.label})" for run in runs[:3])
        raise DttError(f"{path} holds {len(runs)} runs, and one is wanted; give its results file: {labels}.")
    return runs[0]


def _results_files(paths: Iterable[Path], problems: list[str]) -> list[Path]:
    files: dict[str, Path] = {}  # by real path: a file that is named twice is one file
    for path in paths:
        found: list[Path] = []
        if os.path.isdir(path):
            found = _below(path, problems)
            if not found:
                problems.append(f"{path} holds no results of lm-eval; run lm_eval with --log_samples --output_path.")
        elif match := _SAMPLES_NAME.fullmatch(path.name):
            found = sorted(path.parent.glob(f"*{match[2]}.json"))
            if not found:
                problems.append(f"{path} has no results file beside it; give lm-eval's whole output folder.")
        elif os.path.exists(path):
            found = [path]
        else:
            problems.append(f"{path} does not exist; give the folder of lm-eval's --output_path.")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return sorted(files.values(), key=_stamp)


def _below(folder: Path, problems: list[str]) -> list[Path]:
    """Return what has a results file's name at any depth, also below linked folders; each folder is read once."""
    found: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename} can't be read ({error.strerror}); what lies in it is left out.")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [
            Path(root, name)
            for name in sorted([*names, *folders])
            if RESULTS_NAME.fullmatch(name) or name.endswith((ENDING, ATTACKS_ENDING))
        ]
    return found


def _is_attacks(path: Path) -> bool:
    """Return whether a file is to be read as one of attacks: lm-eval's JSON lines are its samples."""
    return path.suffix == ".jsonl"


def _stamp(path: Path) -> str:
    match = RESULTS_NAME.fullmatch(path.name)
    return match[1] if match else ""
