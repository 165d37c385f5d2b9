"""The caches: folders of what can be made or fetched again, their sizes and bounds."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtt_plugin.errors import DttError
from dtt_plugin.files.locks import LOCK_SUFFIX, remove_free_locks
from dtt_plugin.files.replacing import TEMPORARY_SUFFIX, discard, remove_leftovers
from dtt_plugin.paths import cache_folder


@dataclass(frozen=True)
class Entry:
    """One file or folder of a cache."""

    path: Path
    disk_bytes: int
    """That removing it frees: files linked elsewhere don't count."""
    used: float
    """Last use, seconds since 1970."""


@dataclass(frozen=True)
class Cache:
    """One of the folders below the user's cache or `DTT_CACHE_DIR`."""

    name: str
    pattern: str
    """What an entry is called, as for `Path.glob`."""
    most: int
    """The entry that is one too many drops the one unused for longest."""

    @property
    def folder(self) -> Path:
        """Where it is; it may not exist yet."""
        return cache_folder(self.name)

    def entries(self) -> list[Entry]:
        """Return what is in it, the latest used first."""
        found = []
        for path in self.folder.glob(self.pattern):
            if path.name.startswith(".") or path.name.endswith((LOCK_SUFFIX, TEMPORARY_SUFFIX)):
                continue
            with suppress(FileNotFoundError):  # another process dropped it
                found.append(Entry(path, disk_bytes(path), path.lstat().st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    def prune(self, *, older_than_days: float = 0.0, keep: int = 0) -> list[Entry]:
        """Remove what was not used for `older_than_days`, but for the `keep` latest; return it.

        Raises:
            DttError: an entry can't be removed.
        """
        limit = time.time() - older_than_days * 86400
        removed = [entry for entry in self.entries()[keep:] if entry.used <= limit]
        try:
            for entry in removed:
                discard(entry.path)
            if self.folder.is_dir():
                remove_leftovers(self.folder)
                remove_free_locks(self.folder)
        except OSError as error:
            raise DttError(
                f"{self.folder} can't be pruned ({error.strerror or error}); check its permissions."
            ) from error
        return removed


def disk_bytes(path: Path) -> int:
    """Return what removing a file or folder frees, in bytes; files linked elsewhere don't count."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else (path,)
    states = [one.lstat() for one in inside if one.is_file() and not one.is_symlink()]
    return sum(state.st_blocks * 512 for state in states if state.st_nlink == 1)


UNBOUNDED = 1 << 30
"""Nothing is dropped but by `prune`."""
# An alignment of 4096 dimensions has 134 MB.
ALIGNMENTS = Cache("alignments", "*.safetensors", 16)
LABELS = Cache("labels", "*.json", 64)
BAKED = Cache("baked", "?" * 32, UNBOUNDED)
DOWNLOADS = Cache("data", "*", UNBOUNDED)
MODELS = Cache("models", "*", UNBOUNDED)
CACHES = (ALIGNMENTS, BAKED, LABELS, DOWNLOADS, MODELS)
