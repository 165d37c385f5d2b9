"""Baked checkpoints that can be made again, one per content: what `dtt_vllm` starts from."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dtt_plugin import __version__
from dtt_plugin.bake.baking import bake
from dtt_plugin.bake.manifest import baked_facts, fingerprint, is_defended_checkpoint
from dtt_plugin.bake.staging import remove_stale
from dtt_plugin.checkpoint import Checkpoint, open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_json
from dtt_plugin.paths import cache_folder
from dtt_plugin.tokens import DefensiveTokens


@dataclass(frozen=True)
class CachedCheckpoint:
    """One entry of the cache."""

    key: str
    folder: Path
    base_model: str
    tokens_sha256: str
    disk_bytes: int
    """That removing it frees: files linked elsewhere don't count."""
    used: float
    """Last use, seconds since 1970."""


def baked_folder() -> Path:
    """Return the cache's folder; it may not exist yet."""
    return cache_folder("baked")


def bake_cached(
    model: str,
    tokens: DefensiveTokens,
    *,
    revision: str | None = None,
    prompt_format: str | None = None,
    **options: Any,
) -> Path:
    """Return the defended checkpoint of `model` with `tokens`, baked if it is not in the cache.

    What does not change is linked, so an entry takes the disk of the changed files only. Any number of
    processes may ask for the same one.

    Args:
        model: as for `bake`.
        tokens: as for `bake`.
        revision: as for `bake`.
        prompt_format: as for `bake`.
        options: further arguments of `bake` that decide about contents.

    Raises:
        DttError: as `bake` does.
    """
    checkpoint = open_checkpoint(model, revision=revision, need="all")
    key = _key(checkpoint, tokens, {"prompt_format": prompt_format or tokens.prompt_format, **options})
    folder = baked_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{key}.lock"):
            if not is_defended_checkpoint(folder):
                bake(model, tokens, folder, revision=revision, prompt_format=prompt_format, **options)
            elif _broken(folder):
                # Damaged, or linked to a model that was moved away: nothing in it is the only copy of anything.
                bake(model, tokens, folder, revision=revision, prompt_format=prompt_format, force=True, **options)
            os.utime(folder)
    except OSError as error:
        raise DttError(
            f"{folder.parent} can't be used as cache ({error.strerror or error}); set DTT_CACHE_DIR."
        ) from error
    return folder


def _key(checkpoint: Checkpoint, tokens: DefensiveTokens, options: dict[str, Any]) -> str:
    """Return a name made of everything that decides about the contents."""
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns, str(file.resolve()))
        for file in checkpoint.weight_files
    ]
    small = {
        path.name: fingerprint(path)
        for path in sorted(checkpoint.folder.iterdir())
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model")
    }
    identity = [__version__, weights, small, tokens.digest, tokens.method, tokens.model, options]
    return sha256_json(identity)[:32]


def _broken(folder: Path) -> bool:
    dangling = any(path.is_symlink() and not path.exists() for path in folder.iterdir())
    return dangling or baked_facts(str(folder)) is None


def cached_checkpoints() -> list[CachedCheckpoint]:
    """Return what is in the cache, the latest used first."""
    entries = []
    for folder in baked_folder().glob("*"):
        if not folder.is_dir() or not is_defended_checkpoint(folder):
            continue
        facts = baked_facts(str(folder)) or {}  # a damaged one is listed too, so that it can be pruned
        entries.append(
            CachedCheckpoint(
                key=folder.name,
                folder=folder,
                base_model=str(facts.get("base_model", "damaged")),
                tokens_sha256=str(facts.get("tokens_sha256", "")),
                disk_bytes=_disk_bytes(folder),
                used=folder.stat().st_mtime,
            )
        )
    return sorted(entries, key=lambda entry: -entry.used)


def _disk_bytes(folder: Path) -> int:
    files = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(state.st_blocks * 512 for state in files if state.st_nlink == 1)


def prune(*, older_than_days: float = 0.0, keep: int = 0) -> list[CachedCheckpoint]:
    """Remove entries that were not used for `older_than_days`, but not the `keep` latest; return them.

    An engine that runs from an entry goes on: it has its files open.
    """
    limit = time.time() - older_than_days * 86400
    removed = [entry for entry in cached_checkpoints()[keep:] if entry.used <= limit]
    for entry in removed:
        with FileLock(entry.folder.parent / f"{entry.key}.lock"):
            shutil.rmtree(entry.folder, ignore_errors=True)
    if baked_folder().is_dir():
        remove_stale(baked_folder())
    return removed


def entry_as_json(entry: CachedCheckpoint) -> dict[str, Any]:
    """Return an entry as plain JSON values."""
    table: dict[str, Any] = json.loads(json.dumps(entry.__dict__, default=str))
    return table
