"""Learning curves: the training logs that `dtt train` writes beside its token files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.public_names import public_text
from dtt_plugin.safe_text import printable

FORMAT = "dtt.training/1"
_LARGEST_LOG = 256 << 20


@dataclass(frozen=True)
class Curve:
    """What one training run logged."""

    label: str
    loss: tuple[tuple[float, float], ...]
    """(step, loss), by step."""
    asr: tuple[tuple[float, float], ...]
    """(step, ASR as a share from 0 to 1), by step, where it was evaluated."""


def read_curves(paths: Iterable[Path], problems: list[str]) -> list[Curve]:
    """Read training logs; what is none goes to `problems` as a sentence."""
    curves = []
    for path in paths:
        try:
            curves.append(read_curve(path))
        except DttError as error:
            problems.append(str(error))
    return curves


def read_curve(path: Path) -> Curve:
    """Read a training log: JSON lines, the first of which names the format.

    A last line that is cut off is left out: the training may still be running.

    Raises:
        DttError: not a training log.
    """
    try:
        lines = read_bytes(path, most=_LARGEST_LOG).decode("utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}; give a training log.") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and entries:
                break
            raise DttError(f"{path}, line {number}, is not JSON; give a training log ({FORMAT}).") from error
        if not isinstance(entry, dict):
            raise DttError(f"{path}, line {number}, is not an object; give a training log ({FORMAT}).")
        entries.append(entry)
    if not entries or entries[0].get("format") != FORMAT:
        raise DttError(f"{path} does not begin with the format {FORMAT}; give the log that `dtt train` wrote.")
    label = printable(public_text(str(entries[0].get("label") or path.name)))
    return Curve(label, _points(entries, "loss"), _points(entries, "asr"))


def _points(entries: list[dict[str, Any]], name: str) -> tuple[tuple[float, float], ...]:
    """Return (step, value) where both are finite numbers."""
    pairs: list[tuple[Any, Any]] = [(entry.get("step"), entry.get(name)) for entry in entries]
    return tuple(sorted((float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)))


def _is_number(value: Any) -> bool:
    # False for NaN, for infinity, and for a whole number of a thousand digits, which float() refuses.
    return type(value) in (int, float) and abs(value) < 1e300
