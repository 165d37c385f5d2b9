"""A folder that appears at its name complete, or not at all.

It is written beside its final name and renamed there. A killed process leaves
its temporary folder behind; the next one beside it removes it. Whether a
temporary folder is in use shows a lock on it, which dies with its owner.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtt_plugin.errors import DttError
from dtt_plugin.files import sync

_SUFFIX = ".dtt-tmp"
# A folder this young may be between its making and its locking.
_SECONDS_UNTIL_STALE = 60.0
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


@contextmanager
def staged(out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block succeeds, it becomes `out`.

    Args:
        out: the final name.
        force: replace what is there.
        replaceable: whether the folder at `out` is one that `force` may remove.

    Raises:
        DttError: `out` exists, or something can't be written; the temporary folder is gone then.
    """
    check_free(out, force=force, replaceable=replaceable)
    temporary: Path | None = None
    descriptor = -1
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out.parent)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=_SUFFIX))
        descriptor = os.open(temporary, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
        _sync_tree(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _publish(temporary, out, force=force, replaceable=replaceable)
        sync(out.parent)
    except OSError as error:
        raise DttError(_sentence(out, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def check_free(out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Check that the folder `out` may be written.

    Raises:
        DttError: it exists, and `force` is not set or may not remove it.
    """
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if not force:
        raise DttError(f"{out} already exists; choose another --out, or replace it with --force.")
    if not replaceable(out):
        raise DttError(f"{out} is not a defended checkpoint, so --force does not remove it; choose another --out.")


def remove_stale(folder: Path) -> None:
    """Remove temporary folders in `folder` whose owners are gone."""
    for candidate in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):
            if time.time() - candidate.stat().st_mtime < _SECONDS_UNTIL_STALE:
                continue
            descriptor = os.open(candidate, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(candidate, ignore_errors=True)
            finally:
                os.close(descriptor)


def _publish(temporary: Path, out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Rename `temporary` to `out`; with `force` exchange the two, and the old one is removed afterwards."""
    try:
        _rename(temporary, out, _RENAME_NOREPLACE)
        return
    except FileExistsError:
        # It may have appeared while this one was written.
        check_free(out, force=force, replaceable=replaceable)
    if not any(out.iterdir()):
        temporary.rename(out)
        return
    _rename(temporary, out, _RENAME_EXCHANGE)


def _rename(source: Path, target: Path, flag: int) -> None:
    """renameat2(2): fails where the target exists, or exchanges the two in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(target))
    # Without it (a file system that lacks the flags, macOS): the same in two steps.
    if flag == _RENAME_EXCHANGE:
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_SUFFIX))
        target.rename(old / "old")
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        # A link leads to a file that is not ours; it has been there before.
        if not path.is_symlink() and (path.is_dir() or path.stat().st_nlink == 1):
            sync(path)
    sync(folder)


def _sentence(out: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{out} could not be written: the disk is full; free some space or choose another --out."
    where = f" ({error.filename})" if error.filename else ""
    return f"{out} could not be written: {error.strerror or error}{where}."
