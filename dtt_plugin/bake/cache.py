"""Baked checkpoints that can be made again, one per content: what `dtt_vllm` starts from."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dtt_plugin import __version__
from dtt_plugin.bake.baking import bake
from dtt_plugin.bake.options import BakeOptions
from dtt_plugin.checkpoint.defended import baked_facts
from dtt_plugin.checkpoint.opening import Checkpoint, open_checkpoint
from dtt_plugin.checkpoint.state import state
from dtt_plugin.errors import DttError
from dtt_plugin.files.cache import BAKED, disk_bytes
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.locks import LOCK_SUFFIX, locked, remove_free_locks
from dtt_plugin.files.replacing import discard, remove_leftovers, replacing
from dtt_plugin.tokens.files import DefensiveTokens


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
    damaged: bool
    """It is not what was baked: the next use bakes it again."""


def baked_folder() -> Path:
    """Return the cache's folder; it may not exist yet."""
    return BAKED.folder


def bake_cached(model: str, tokens: DefensiveTokens, options: BakeOptions | None = None) -> Path:
    """Return the defended checkpoint of `model` with `tokens`, baked if it is not in the cache.

    What does not change is linked, so an entry takes the disk of the changed files only. Any number of
    processes may ask for the same one.

    Args:
        model: as for `bake`.
        tokens: as for `bake`.
        options: as for `bake`.

    Raises:
        DttError: as `bake` does.
    """
    options = options or BakeOptions()
    checkpoint = open_checkpoint(model, revision=options.revision, need="all")
    key = _key(checkpoint, tokens, options)
    folder = baked_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(_lock(folder)):
            if not _is_whole(folder):
                # Damaged, or linked to a model that was moved away: nothing in it is the only copy of anything.
                discard(folder)
                bake(model, tokens, folder, options)
                with replacing(_note(folder)) as temporary:
                    temporary.write_text(state(str(folder)) or "", encoding="ascii")
            os.utime(folder)
    except OSError as error:
        raise DttError(
            f"{folder.parent} can't be used as cache ({error.strerror or error}); set DTT_CACHE_DIR."
        ) from error
    return folder


def _key(checkpoint: Checkpoint, tokens: DefensiveTokens, options: BakeOptions) -> str:
    """Return a name made of everything that decides about the contents."""
    # The checkpoint's revision is the commit. What is as by default stays out, so that a new option renames no entry.
    options = replace(options, revision=None)
    given = {name: value for name, value in asdict(options).items() if value != getattr(BakeOptions, name)}
    given["prompt_format"] = options.prompt_format or tokens.prompt_format
    # Links lead to the model's own folder, so two equal models have an entry each.
    base = [str(checkpoint.folder.resolve()), [file.name for file in checkpoint.weight_files]]
    of_tokens = [tokens.digest, tokens.method, tokens.model, tokens.source_model]
    identity = [__version__, state(str(checkpoint.folder)), base, checkpoint.revision, of_tokens, given]
    return sha256_json(identity)[:32]


def _note(folder: Path) -> Path:
    """Return the file beside an entry that holds the state in which it was baked."""
    return folder.with_name(f"{folder.name}.state")


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{LOCK_SUFFIX}")


def _is_whole(folder: Path) -> bool:
    try:
        baked = _note(folder).read_text(encoding="ascii")
        return baked_facts(str(folder)) is not None and state(str(folder)) == baked
    except (DttError, OSError, ValueError):
        return False


def cached_checkpoints() -> list[CachedCheckpoint]:
    """Return what is in the cache, the latest used first; damaged entries, too, so that they can be pruned."""
    entries = []
    for folder in baked_folder().glob("*"):
        if not re.fullmatch("[0-9a-f]{32}", folder.name):
            continue
        whole = _is_whole(folder)
        facts = baked_facts(str(folder)) or {}
        with suppress(FileNotFoundError):  # another process pruned it
            entries.append(
                CachedCheckpoint(
                    key=folder.name,
                    folder=folder,
                    base_model=str(facts["base_model"]) if whole else "damaged",
                    tokens_sha256=str(facts.get("tokens_sha256", "")),
                    disk_bytes=disk_bytes(folder),
                    used=folder.lstat().st_mtime,
                    damaged=not whole,
                )
            )
    return sorted(entries, key=lambda entry: -entry.used)


def prune(*, older_than_days: float = 0.0, keep: int = 0) -> list[CachedCheckpoint]:
    """Remove damaged entries, and those not used for `older_than_days` but for the `keep` latest; return them.

    An engine that runs from an entry goes on: it has its files open.

    Raises:
        DttError: an entry can't be removed.
    """
    limit = time.time() - older_than_days * 86400
    entries = cached_checkpoints()
    whole = [entry for entry in entries if not entry.damaged]
    spared = [*whole[:keep], *(entry for entry in whole if entry.used > limit)]
    removed = []
    try:
        for entry in entries:
            with locked(_lock(entry.folder)):
                # Another process may have baked a damaged one again by now.
                if entry not in spared and not (entry.damaged and _is_whole(entry.folder)):
                    discard(entry.folder)
                    _note(entry.folder).unlink(missing_ok=True)
                    removed.append(entry)
        if baked_folder().is_dir():
            remove_leftovers(baked_folder())
            remove_free_locks(baked_folder())
    except OSError as error:
        raise DttError(
            f"{baked_folder()} can't be pruned ({error.strerror or error}); check its permissions."
        ) from error
    return removed
