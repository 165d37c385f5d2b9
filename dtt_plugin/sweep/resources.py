"""What one engine of a sweep needs of a cluster: the key `resources:` of a sweep file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.sweep.plain_yaml import read_plain_yaml

_NAMES = ("cpus", "gpus", "memory_gib")


@dataclass(frozen=True)
class Resources:
    """CPUs, GPUs and memory of a task; None leaves the choice to the cluster."""

    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float | None = None


def read_resources(path: Path) -> Resources:
    """Return what the sweep file `path` asks for.

    Raises:
        DttError: it is no plain YAML, or `resources:` holds anything but amounts by name.
    """
    content = read_plain_yaml(path)
    return check_resources(path, content.get("resources") if isinstance(content, dict) else None)


def check_resources(path: Path, value: Any) -> Resources:
    """Return `resources:` of the sweep file `path`.

    Raises:
        DttError: it is not such a mapping.
    """
    if value is None:
        return Resources()
    if not isinstance(value, Mapping) or (unknown := [name for name in value if name not in _NAMES]):
        what = f"has the unknown key {unknown[0]!r}" if isinstance(value, Mapping) else "is no mapping"
        raise DttError(f"{path}: resources: {what}; it knows {', '.join(_NAMES)}.")
    for name, amount in value.items():
        least = 0 if name == "gpus" else 1e-9
        if type(amount) not in (int, float) or not math.isfinite(amount) or amount < least:
            raise DttError(f"{path}: resources, {name}: {str(amount)[:80]!r} is no amount.")
    return Resources(**value)
