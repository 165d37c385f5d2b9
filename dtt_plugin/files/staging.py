"""A folder that appears at its name complete, or not at all: written beside it and renamed there."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import sync, temporary_sibling

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


@contextmanager
def staged(out: Path, *, force: bool = False, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block succeeds, it becomes `out`.

    Args:
        out: the final name.
        force: replace what is there.
        replaceable: whether the folder at `out` is one that `force` may remove; None: the command has no --force.

    Raises:
        DttError: `out` exists, or something can't be written; the temporary folder is gone then.
    """
    check_free(out, force=force, replaceable=replaceable)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(out, folder=True) as temporary:
            yield temporary
            _sync_tree(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)
            _publish(temporary, out, force=force, replaceable=replaceable)
            sync(out.parent)
    except OSError as error:
        raise DttError(_sentence(out, error)) from error


def check_free(out: Path, *, force: bool, replaceable: Callable[[Path], bool] | None) -> None:
    """Check that the folder `out` may be written.

    Raises:
        DttError: it exists, and `force` is not set or may not remove it.
    """
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if replaceable is None:
        raise DttError(f"{out} already exists; choose another name.")
    if not force:
        raise DttError(f"{out} already exists; choose another --out, or replace it with --force.")
    if not replaceable(out):
        raise DttError(f"{out} is not a defended checkpoint, so --force does not remove it; choose another --out.")


def _publish(temporary: Path, out: Path, *, force: bool, replaceable: Callable[[Path], bool] | None) -> None:
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
        with temporary_sibling(target, folder=True) as grave:
            old = target.rename(grave / target.name)
            try:
                source.rename(target)
            except OSError:
                old.rename(target)
                raise
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
