"""Writing files so that a reader never sees half of one.

What is being written has a temporary name beside its own. A killed process leaves it behind; whoever writes
into that folder next removes it. Whether it is in use shows a lock on it, which dies with its owner.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError

TEMPORARY_SUFFIX = ".dtt-tmp"
_NAME_CHARACTERS = 40  # of the final name in the temporary one, which must not be too long for a file system


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block succeeds it is synced and renamed to `path`.

    Raises:
        DttError: the file can't be written (no space, no permission). Nothing is left behind then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(path) as temporary:
            yield temporary
            sync(temporary)
            # mkstemp makes files private; the result gets what open() would have given it.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            sync(path.parent)
    except OSError as error:
        raise DttError(f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def temporary_sibling(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file, or folder, beside `path`; what is at its name in the end is removed.

    Raises:
        OSError: it can't be made.
    """
    remove_leftovers(path.parent)
    temporary, descriptor = _locked(path, folder=folder)
    try:
        yield temporary
    finally:
        with suppress(OSError):
            _remove(temporary)
        os.close(descriptor)


def _locked(path: Path, *, folder: bool) -> tuple[Path, int]:
    while True:
        prefix = f".{path.name[:_NAME_CHARACTERS]}."
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=TEMPORARY_SUFFIX))
        else:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=TEMPORARY_SUFFIX)
            os.close(handle)
            temporary = Path(name)
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # taken for a leftover before it had its lock
            continue
        with suppress(OSError):  # a file system without locks; there nobody can take it for a leftover either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` whose owners are gone."""
    for candidate in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            if candidate.is_symlink():  # it was exchanged for a new folder, which has its name
                candidate.unlink()
                continue
            descriptor = os.open(candidate, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(candidate)
            finally:
                os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there, so that a kill leaves all of it at its name or nothing.

    Raises:
        OSError: it can't be renamed.
    """
    if os.path.lexists(path):
        with temporary_sibling(path, folder=True) as grave:
            path.rename(grave / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def keep_newest(folder: Path, pattern: str, most: int) -> None:
    """Remove of the files in `folder` that match all but the `most` that were written or touched last."""
    times = {}
    for path in folder.glob(pattern):
        with suppress(OSError):  # another process dropped it
            times[path] = path.stat().st_mtime
    for path in sorted(times, key=lambda path: -times[path])[most:]:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        # Half a surrogate pair has no bytes in UTF-8; in JSON its escape says the same.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Flush a file's or a folder's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
