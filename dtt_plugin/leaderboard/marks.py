"""Marks on figures that would mislead without one, the same in every form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WEAK_NATIVE = "†"


def weak_mark(ratio: Mapping[str, Any]) -> str:
    """Return the mark of a gap-closed ratio whose native tokens are worse than a row of the table; "" for another."""
    return WEAK_NATIVE if ratio.get("weak_native") else ""
