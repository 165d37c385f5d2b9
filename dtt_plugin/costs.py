"""What making tokens and checkpoints cost: recorded by our commands, carried along, shown by the leaderboard."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COSTS = ("train_seconds", "align_seconds", "transfer_seconds", "bake_seconds", "peak_memory_mb")


def peak_memory_mb() -> float:
    """Return the most memory that this process has held, in MB of 10^6 bytes."""
    if sys.platform == "linux":
        # There ru_maxrss begins with what the process held that started this one.
        _, found, rest = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").partition("VmHWM:")
        if found:
            return int(rest.split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def recorded_costs(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the costs among a file's metadata; what is no number counts as not recorded."""
    costs = {}
    for name in COSTS:
        try:
            cost = float(metadata[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(cost) and cost >= 0:
            costs[name] = cost
    return costs
