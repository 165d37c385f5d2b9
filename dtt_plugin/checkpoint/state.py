"""Which state a model, tokenizer or adapter is in: what decides whether an older answer still holds.

Every cache and every key of this package asks here. Two folders in the same state hold the same contents, on
whatever machine; a hub model's state is its commit. Digests of large files are noted, so that a file is read
again only when its inode says that it may have changed: a change of its contents changes the inode's ctime,
which no program can set back.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint.hub import cached_commit
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_file, sha256_json
from dtt_plugin.files.replacing import keep_newest, replacing, sync
from dtt_plugin.paths import cache_folder
from dtt_plugin.public_names import is_hub_id

MOST_NOTES = 4096
# Smaller files are read every time: that takes as long as to look after their notes.
_NOTED_NBYTES = 64 << 20
# A file written within this time may be written again without a visible change of its time stamp.
_SETTLED_SECONDS = 2.0
# Nor may an inode that was changed within one tick of the kernel's clock.
_TICK_SECONDS = 0.02
# What no engine reads: texts for people, a trainer's own state, and what a defended checkpoint says about itself.
_UNREAD = re.compile(
    r"\..*|.*\.(md|log|png|jpg|svg)|(LICENSE|NOTICE)(\.txt)?|dtt_checkpoint\.json"
    r"|(optimizer|scheduler|training_args|rng_state.*)\.(pt|pth|bin)",
    re.IGNORECASE,
)
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz)", re.IGNORECASE)
_FOLDERS = ("additional_chat_templates",)
# Model arguments that name a place to write to, which is no part of the model.
_PLACES = re.compile(r".*_dir|offload_folder|output_path")


def state(model: str, revision: str | None = None, *, cache_dir: str | None = None) -> str | None:
    """Return the state of a model, tokenizer or adapter: "sha256:..." of its contents, or its commit.

    Args:
        model: a folder, a file, or a hub id.
        revision: branch, tag or commit, for a hub id.
        cache_dir: of the hub's client, where it is not the usual one.

    Returns:
        None where it can't be told: neither on this disk nor in the hub's cache. It equals no other state then.

    Raises:
        DttError: a file can't be read.
    """
    path = Path(os.path.expanduser(model))
    try:
        if os.path.isdir(path):
            return _digest_of(_files(path))
        if os.path.isfile(path):
            beside = _files(path.parent) if (path.parent / "config.json").is_file() else {}
            small = {name: file for name, file in beside.items() if not _WEIGHTS.fullmatch(name)}
            return _digest_of({**small, path.name: path})
    except OSError as error:
        raise DttError(f"{error.filename} can't be read ({error.strerror}); check the file.") from error
    return cached_commit(model, revision, cache_dir=cache_dir)


def argument_states(arguments: Mapping[str, Any], model: str) -> dict[str, str]:
    """Return the states of all files, folders and cached hub models that arguments of a run lead to.

    Args:
        arguments: model arguments, such as `peft`, `tokenizer` or `lora_local_path`; tables and lists in them and
            JSON are searched, too.
        model: the model's folder, from which `subfolder` and `gguf_file` count.

    Raises:
        DttError: a file can't be read.
    """
    revisions = [*filter(None, (arguments.get("tokenizer_revision"), arguments.get("revision"))), None]
    cache_dir = arguments.get("cache_dir") or arguments.get("download_dir")
    found: dict[str, str] = {}

    def look(name: str, value: Any) -> None:
        if _PLACES.fullmatch(name.rpartition(".")[2]):
            return
        if isinstance(value, Mapping):
            for key, inner in value.items():
                look(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for number, inner in enumerate(value):
                look(f"{name}.{number}", inner)
        elif isinstance(value, os.PathLike):
            look(name, os.fspath(value))
        elif isinstance(value, str) and value:
            look_at_text(name, value)

    def look_at_text(name: str, text: str) -> None:
        # Both, since whoever takes the argument decides which of them is meant.
        paths = [p for p in dict.fromkeys((text, os.path.join(model, text))) if os.path.exists(os.path.expanduser(p))]
        if paths:
            found[name] = " ".join(state(path) or "" for path in paths)
            return
        if text[0] in "[{":
            table = None
            with suppress(ValueError, RecursionError):
                table = json.loads(text)
            look(name, table)
        elif is_hub_id(text):
            commits = (cached_commit(text, revision, cache_dir=cache_dir) for revision in revisions)
            if commit := next((commit for commit in commits if commit), None):
                found[name] = commit
        elif "=" in text or "," in text:  # vLLM's lists of adapters: name=folder
            look(name, re.split("[=,]", text))

    for name, value in arguments.items():
        look(name, value)
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Return the files that can change an answer, by their names relative to `folder`."""
    places = [folder, *(folder / name for name in _FOLDERS)]
    files = [path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in files if not _UNREAD.fullmatch(path.name)}


def _digest_of(files: Mapping[str, Path]) -> str:
    notes = DigestNotes(cache_folder("digests"))

    def digest(path: Path) -> str:
        if path.stat().st_size < _NOTED_NBYTES:
            return sha256_file(path)
        return notes.digest(path, lambda: sha256_file(path))

    with ThreadPoolExecutor(2, thread_name_prefix="dtt-state") as pool:
        return "sha256:" + sha256_json(dict(zip(files, pool.map(digest, files.values()), strict=True)))


@dataclass(frozen=True)
class DigestNotes:
    """Digests of files, or parts of files, that have not changed since they were read."""

    folder: Path

    def digest(self, file: Path, read: Callable[[], str], part: Any = None) -> str:
        """Return the digest of `file`, from a note where it has not changed since, else from `read`.

        Args:
            file: the file.
            read: computes the digest, 64 hexadecimal digits.
            part: which part of the file it is of.

        Raises:
            OSError: the file can't be read.
        """
        identity, settled = _identity(file)
        note = self.folder / sha256_json([identity, part])
        with suppress(OSError, ValueError):
            digest, check = note.read_text(encoding="ascii").split()
            if check == _check(note, digest):
                return digest
        digest = read()
        # A note must not tell of a file that was written while it was read.
        if settled and _identity(file)[0] == identity:
            with suppress(DttError):  # a folder that can't be written: then the file is read again
                with replacing(note) as temporary:
                    temporary.write_text(f"{digest} {_check(note, digest)}\n", encoding="ascii")
                keep_newest(self.folder, "?" * 64, MOST_NOTES)
        return digest


def _check(note: Path, digest: str) -> str:
    """Return what shows that a note is whole and belongs to its name."""
    return sha256_bytes(f"{note.name} {digest}".encode())


def _identity(file: Path) -> tuple[list[int], bool]:
    """Return what the inode would have to change for the file's bytes to change, and whether it would show."""
    # Through a memory map, a page that waits to be written to the disk can be changed without a trace: none waits.
    with suppress(OSError):
        sync(file)
    stat = file.stat()
    now = time.time()
    if 0 <= now - stat.st_ctime < _TICK_SECONDS:
        time.sleep(_TICK_SECONDS)
    identity = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return identity, now - stat.st_mtime > _SETTLED_SECONDS
