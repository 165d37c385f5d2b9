"""What training some tokens cost: told by the log beside their file, since the file has the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_bytes

_LARGEST_LOG = 256 << 20


def log_of(tokens: Path) -> Path:
    """Return where `dtt train` writes the log of the token file `tokens`: JSON lines."""
    return tokens.with_name(f"{tokens.name.removesuffix('.safetensors')}.log.jsonl")


def end_of_run(digest: str, *, step: int, seconds: float) -> dict[str, Any]:
    """Return the last line of a finished run's log.

    Args:
        digest: of the tokens.
        step: the run's last.
        seconds: of training and measuring, pauses excluded.
    """
    return {"step": step, "seconds": seconds, "tokens_sha256": digest}


def train_seconds(tokens: Path, digest: str) -> float | None:
    """Return what training took as the log beside the token file tells; None where none is there or it is another's."""
    try:
        lines = read_bytes(log_of(tokens), most=_LARGEST_LOG).splitlines()
        entry = json.loads(lines[-1])
        return float(entry["seconds"]) if entry["tokens_sha256"] == digest else None
    except (DttError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
