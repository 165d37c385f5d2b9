"""Values of files that may be anybody's: each is asked for what it should be, and something else is none."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError


def load_json(text: bytes, where: str) -> Any:
    """Parse JSON that `where` names in the sentence on what is wrong with it.

    Raises:
        DttError: it is no JSON, or holds what can be written nowhere.
    """
    try:
        value = json.loads(text.decode())
        if rb"\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be shown and hashed nowhere
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(":")[0]
        raise DttError(f"{where} is not readable JSON ({reason}); restore it or run lm-eval again.") from error


def read_file(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        DttError: it can't be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise DttError(f"{path} is no file; give lm-eval's output folder as lm-eval wrote it.")
        return path.read_bytes()
    except OSError as error:
        raise DttError(f"{path} can't be read ({error.strerror}); restore it or run lm-eval again.") from error


def as_table(value: Any, *names: str) -> dict[str, Any]:
    """Return the table below `names`; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a list as it is; an empty one for anything else."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return text as it is; "" for anything else."""
    return value if isinstance(value, str) else ""


def as_number(value: Any) -> float | None:
    """Return a finite number of at least 0, also from text; None for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
