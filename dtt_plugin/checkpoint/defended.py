"""What a defended checkpoint says about itself, for whoever reads one: `dtt bake` writes it (`bake/manifest.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint.folder import read_json_table
from dtt_plugin.costs import recorded_costs
from dtt_plugin.errors import DttError

MANIFEST = "dtt_checkpoint.json"
FORMAT = "dtt.checkpoint/1"
IDS_KEY = "defensive_token_ids"
"""In config.json of a defended checkpoint."""
MOST_TOKENS = 1000
"""DefensiveTokens that a token file or a checkpoint may have."""

# What whoever reads a manifest relies on.
_PARTS = {
    "dtt_plugin": str,
    "base_model": str,
    "base_tied": bool,
    "tokens": dict,
    "token_ids": list,
    "reuse_reserved": bool,
    "prompt_format": str,
    "default_on": bool,
    "changed_tensors": dict,
    "files": dict,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the defended checkpoint `folder`.

    Raises:
        DttError: it has none, or one of another format.
    """
    if not (folder / MANIFEST).is_file():
        raise DttError(f"{folder} is not a defended checkpoint (it has no {MANIFEST}); make one with `dtt bake`.")
    manifest = read_json_table(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DttError(f"{folder / MANIFEST} has the format {manifest.get('format')!r}, not {FORMAT!r}; bake it again.")
    if not _is_whole(manifest):
        raise DttError(f"{folder / MANIFEST} is damaged: parts of it are missing; bake it again.")
    return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    return (
        all(isinstance(manifest.get(name), kind) for name, kind in _PARTS.items())
        and len(manifest["token_ids"]) <= MOST_TOKENS
        and manifest["tokens"].keys() >= {"sha256", "method", "source_model", "k", "width"}
        and isinstance(manifest.get("plain_text_markers", []), list)
        and all(isinstance(digest, str) for digest in manifest["files"].values())
        and all(isinstance(entry, dict) and "sha256" in entry for entry in manifest["changed_tensors"].values())
    )


def is_defended_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a defended checkpoint."""
    return (folder / MANIFEST).is_file()


def baked_facts(model: str) -> dict[str, Any] | None:
    """Return what the manifest of a defended checkpoint says: base model, method, costs. None for other models."""
    folder = Path(model)
    try:
        if not is_defended_checkpoint(folder):
            return None
        manifest = read_manifest(folder)
    except (DttError, OSError, ValueError):
        return None
    tokens = manifest.get("tokens")
    tokens = tokens if isinstance(tokens, dict) else {}
    costs = manifest.get("costs")
    return {
        "base_model": manifest.get("base_model"),
        "method": tokens.get("method"),
        "tokens_sha256": tokens.get("sha256"),
        "costs": recorded_costs(costs if isinstance(costs, dict) else {}),
    }
