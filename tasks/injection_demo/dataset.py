"""Our own small set, shipped with the package, so that the main job runs without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.data.records import Record, read_json
from dtt_plugin.tasks.adaptive import adaptive_dataset
from dtt_plugin.tasks.attacks import VARIANTS, injection_dataset


def demo(*, variants: Sequence[str] = VARIANTS, **_metadata: Any) -> dict[str, Any]:
    """Return the shipped records with the asked variants."""
    return injection_dataset(*demo_data(), variants)


def demo_data() -> tuple[list[Record], list[str]]:
    """Return the shipped records and ignore-attack sentences."""
    content = read_json(Path(__file__).parent / "records.json")
    return content["records"], content["ignore_sentences"]


def demo_adaptive(*, attacks: str = "", variants: Sequence[str] = VARIANTS, **_metadata: Any) -> dict[str, Any]:
    """Return the shipped records that a file of adaptive attacks has a suffix for, with that attack, too."""
    return adaptive_dataset(attacks, "injection_demo", *demo_data(), variants)
