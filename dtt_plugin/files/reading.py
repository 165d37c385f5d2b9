"""Reading files that someone else made: regular ones only, JSON in UTF-8 and of a bounded size.

The bounds are those of real files (the largest tokenizer.json have 35 MB and six hundred thousand lists, the indices of
the largest mixtures of experts 25 MB), so that a small or sparse file can't cost minutes or gigabytes.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from dtt_plugin.errors import DttError

LARGEST_JSON = 64 << 20
# Python's lists and tables take up to thirty times the bytes that they have in JSON.
_MOST_CONTAINERS = 1_500_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open the file `path` for reading; unlike `open` it never waits for a pipe's other end.

    Raises:
        DttError: it is a folder, pipe, socket or device.
        OSError: it can't be opened.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise DttError(f"{path} is not a path; check the name.") from error
    if not stat.S_ISREG(mode):
        kind = _OTHER_KINDS.get(stat.S_IFMT(mode), "no file")
        raise DttError(f"{path} is {kind} where a file is needed; give a regular file.")
    return path.open("rb")


def read_bytes(path: Path, *, most: int = LARGEST_JSON) -> bytes:
    """Read the file `path` of at most `most` bytes.

    Raises:
        DttError: it is larger, or no regular file.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DttError(f"{path} has more than {most >> 20} MB, which no such file needs; check what it is.")
    return content


def read_json(
    path: Path,
    *,
    most: int = LARGEST_JSON,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the JSON value in the file `path`, in UTF-8 with or without a byte order mark.

    Raises:
        DttError: the file is too large, or no regular file.
        OSError: it can't be read.
        ValueError: it is not JSON, or nested too deeply.
    """
    return parse_json(read_bytes(path, most=most), pairs_hook=pairs_hook)


def parse_json(content: bytes, *, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the JSON value in `content`, in UTF-8 with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, in another encoding, nested too deeply, of millions of lists and tables, or
            with half a surrogate pair, which is no text that could be written again.
    """
    if content.count(b"[") + content.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"more than {_MOST_CONTAINERS} lists and tables")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=pairs_hook)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("lists or tables nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair") from error
    return value
