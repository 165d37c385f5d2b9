"""Lock files that are there only while somebody holds them or waits for them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_SUFFIX = ".lock"


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which goes when the block ends.

    A killed process leaves its file, and its hold on it dies: the next one takes that file and removes it.

    Args:
        path: in a folder that exists; two threads of a process exclude each other, too.
        wait: until it is free.

    Raises:
        BlockingIOError: another one holds it, and `wait` is false.
        OSError: the file can't be made or locked.
    """
    descriptor = _acquired(path, wait=wait)
    try:
        yield
    finally:
        # Before it is released: whoever waits for this file finds it gone and makes another.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(path: Path, *, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it


def remove_free_locks(folder: Path) -> None:
    """Remove the lock files in `folder` that killed processes left."""
    for path in folder.glob(f"*{LOCK_SUFFIX}"):
        with suppress(OSError), locked(path, wait=False):
            pass
