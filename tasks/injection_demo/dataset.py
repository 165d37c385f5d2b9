"""Our own small set, shipped with the package, so that the main job runs without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.data.records import read_json
from dtt_plugin.tasks.attacks import VARIANTS, injection_dataset


def demo(*, variants: Sequence[str] = VARIANTS, **_metadata: Any) -> dict[str, Any]:
    """Return the shipped records with the asked variants."""
    content = read_json(Path(__file__).parent / "records.json")
    return injection_dataset(content["records"], content["ignore_sentences"], variants)
