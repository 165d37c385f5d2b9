"""Where the plugin keeps what it can make again: data, models, baked checkpoints, alignments."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_DIR_VARIABLE = "DTT_CACHE_DIR"


def cache_folder(name: str) -> Path:
    """Return the folder `name` below `$DTT_CACHE_DIR`, or below the user's cache; it may not exist yet."""
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    base = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("dtt-plugin")
    return base / name
