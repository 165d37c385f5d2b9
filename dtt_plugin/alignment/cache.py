"""Solved once per pair: alignments kept by the content of both matrices, both vocabularies and the options."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtt_plugin.alignment.result import Alignment, load_alignment, save_alignment
from dtt_plugin.checkpoint.state import DigestNotes
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.errors import DttError
from dtt_plugin.files.cache import ALIGNMENTS
from dtt_plugin.files.locks import LOCK_SUFFIX, locked
from dtt_plugin.files.replacing import keep_newest
from dtt_plugin.progress import Bar

MOST_ENTRIES = ALIGNMENTS.most
_BLOCK_NBYTES = 2**24


def cache_folder() -> Path:
    """Return the folder in which the command keeps alignments."""
    return ALIGNMENTS.folder


def matrix_digest(location: TensorLocation, advance: Callable[[int], object] = int) -> str:
    """Return the SHA-256 of the tensor's bytes as they are stored, reading it block by block.

    Args:
        location: the tensor.
        advance: is told how many bytes were read, after each block.
    """
    digest = hashlib.sha256()
    buffer = np.empty(min(_BLOCK_NBYTES, location.nbytes), np.uint8)
    for start in range(0, location.nbytes, _BLOCK_NBYTES):
        part = buffer[: location.nbytes - start]
        location.read_into(part, start)
        digest.update(part.data)
        advance(len(part))
    return digest.hexdigest()


def matrix_digests(
    locations: Sequence[TensorLocation], cache: AlignmentCache | None, *, at_once: int = 2, progress: bool = False
) -> list[str]:
    """Return the digest of each tensor; `at_once` are read at a time."""
    digest = cache.digest if cache else matrix_digest
    total = sum(location.nbytes for location in locations)
    with (
        Bar(total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=not progress) as bar,
        ThreadPoolExecutor(at_once, thread_name_prefix="dtt-digest") as pool,
    ):
        return list(pool.map(lambda location: digest(location, bar.update), locations))


@dataclass(frozen=True)
class AlignmentCache:
    """A folder of solved alignments and of digests of matrices that have not changed since they were read."""

    folder: Path

    def digest(self, location: TensorLocation, advance: Callable[[int], object] = int) -> str:
        """Return the digest of the tensor, from a note where its file has not changed since."""
        notes, part = DigestNotes(self.folder / "digests"), [location.offset, location.nbytes]
        return notes.digest(location.file, lambda: matrix_digest(location, advance), part)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Say in one sentence what to do where the cache can't be written."""
        try:
            yield
        except (OSError, DttError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(reason, OSError):
                raise
            raise DttError(
                f"The cache folder {self.folder} can't be written ({reason.strerror or reason}); set DTT_CACHE_DIR "
                "to one that can, or use --no-cache."
            ) from error

    @contextmanager
    def locked(self, keys: Sequence[str]) -> Iterator[None]:
        """Hold the locks of all `keys`; a second process with one of them waits until it is released.

        Raises:
            DttError: the cache folder can't be written.
        """
        with ExitStack() as stack:
            with self._written():
                self.folder.mkdir(parents=True, exist_ok=True)
                # In one order everywhere, so that two processes never wait for each other.
                for key in sorted(set(keys)):
                    stack.enter_context(locked(self.folder / f"{key}{LOCK_SUFFIX}"))
            yield

    def load(self, key: str) -> Alignment | None:
        """Return the alignment stored under `key`; a damaged one counts as none."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            alignment = load_alignment(path)
            os.utime(path)  # the least recently used make room first
        except (DttError, OSError):
            return None
        return alignment

    def store(self, key: str, alignment: Alignment) -> None:
        """Keep `alignment` under `key`, and drop the least recently used beyond `MOST_ENTRIES`.

        Raises:
            DttError: the cache folder can't be written.
        """
        with self._written():
            save_alignment(self._path(key), alignment, with_costs=True)
            keep_newest(self.folder, ALIGNMENTS.pattern, MOST_ENTRIES)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
