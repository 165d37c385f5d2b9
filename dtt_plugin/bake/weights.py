"""Writing the tensors that change, and linking the files that do not.

Loaders read every tensor of every file that the index names, whatever the
index says about that tensor. A file that holds a changed tensor is therefore
written again, with its other tensors copied inside the kernel (shared where
the file system can); every other file is linked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dtt_plugin.bake.plan import BakePlan, TensorChange
from dtt_plugin.checkpoint.folder import HEAD_NAMES, INDEX_FILE, is_copy, read_json_table, shards_of_index
from dtt_plugin.checkpoint.tensors import TensorLocation, read_header, safetensors_header
from dtt_plugin.errors import DttError
from dtt_plugin.progress import Bar

logger = logging.getLogger("dtt_plugin")

BLOCK = 8 << 20
_FICLONERANGE = 0x4020940D
_ALIGNMENT = 4096

How = Literal["written", "linked", "symlinked", "copied"]

OVERLAY_FILE = "zz-defensive-tokens.safetensors"
"""Sorted behind every usual name of a weight file."""
_SINGLE, _SINGLE_UNDER_OVERLAY = "model.safetensors", "model-base.safetensors"


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a file to be written."""

    name: str
    source: TensorLocation
    change: TensorChange | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.change.shape if self.change else self.source.shape

    @property
    def nbytes(self) -> int:
        return self.change.nbytes if self.change else self.source.nbytes


def write_weights(plan: BakePlan, folder: Path, *, copy: bool) -> dict[str, How]:
    """Write or link every weight file of the defended checkpoint into `folder`.

    Args:
        plan: what changes.
        folder: an empty folder.
        copy: copy unchanged files instead of linking them.

    Returns:
        Per file name how it came there.
    """
    changes = {change.name: change for change in plan.changes}
    embedding_file = plan.changes[0].source.file
    how: dict[str, How] = {}
    for file in plan.checkpoint.weight_files:
        tensors, metadata = read_header(file)
        in_order = sorted(tensors.items(), key=lambda item: item[1].offset)
        kept = [
            _Tensor(name, changes[name].source if name in changes else location, changes.get(name))
            for name, location in in_order
        ]
        if file == embedding_file:
            # A head of its own for a tied model stands beside the embedding it is made from.
            kept += [_Tensor(change.name, change.source, change) for change in plan.changes if change.new]
        if any(tensor.change for tensor in kept):
            _write_file(folder / file.name, kept, metadata, data_start=in_order[0][1].offset)
            how[file.name] = "written"
        else:
            how[file.name] = link(file, folder / file.name, copy=copy)
    _write_index(plan, folder)
    return how


def write_overlay(plan: BakePlan, folder: Path, *, copy: bool) -> dict[str, How]:
    """Write the changed tensors alone, to a file that loaders read last; link every file of the base model.

    transformers and vLLM's default loader read the files in the order of their names, and a tensor that comes
    twice counts as it came last. Other loaders may read in another order and would then use the base model's
    rows, so this is for those who know theirs.

    Raises:
        DttError: a tensor grows; vLLM refuses the base model's tensor then, before it comes to the new one.
    """
    grown = [change.name for change in plan.changes if change.n_rows != change.source.shape[0]]
    if grown:
        raise DttError(
            f"--overlay: {grown[0]} has to grow, which needs its file written again; add --reuse-reserved if "
            "the tokenizer has reserved tokens, or leave --overlay out."
        )
    how: dict[str, How] = {}
    weight_map: dict[str, str] = {}
    for file in plan.checkpoint.weight_files:
        # With a file of this name, transformers reads no index.
        name = _SINGLE_UNDER_OVERLAY if file.name == _SINGLE else file.name
        how[name] = link(file, folder / name, copy=copy)
        weight_map |= dict.fromkeys(read_header(file)[0], name)
    tensors = [_Tensor(change.name, change.source, change) for change in plan.changes]
    _write_file(folder / OVERLAY_FILE, tensors, {"format": "pt"}, data_start=0)
    how[OVERLAY_FILE] = "written"
    weight_map |= dict.fromkeys((change.name for change in plan.changes), OVERLAY_FILE)
    new = sum(change.nbytes for change in plan.changes if change.new)
    total = sum(location.nbytes for location in plan.checkpoint.tensors().values()) + new
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return how


def indexed_tensors(folder: Path) -> dict[str, TensorLocation]:
    """Return where each tensor of `folder` lies by its index, or in its single file."""
    if (folder / _SINGLE).is_file() or not (folder / INDEX_FILE).is_file():
        return {name: at for file in folder.glob("*.safetensors") for name, at in read_header(file)[0].items()}
    headers = {file: read_header(folder / file)[0] for file in shards_of_index(folder / INDEX_FILE)}
    weight_map: dict[str, str] = read_json_table(folder / INDEX_FILE)["weight_map"]
    return {name: headers[file][name] for name, file in weight_map.items() if name in headers[file]}


def link(source: Path, target: Path, *, copy: bool) -> How:
    """Make `target` the file `source`: a hard link, else a symbolic link, or a copy."""
    real = source.resolve()  # in a hub cache, the blob
    if copy:
        _copy_file(real, target)
        return "copied"
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.ENOTSUP):
            raise
        target.symlink_to(real)
        return "symlinked"
    return "linked"


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _write_file(path: Path, tensors: Sequence[_Tensor], metadata: dict[str, str], *, data_start: int) -> None:
    entries = [(tensor.name, tensor.source.dtype, tensor.shape, tensor.nbytes) for tensor in tensors]
    # The data starts where the source's does, modulo the block size: a file system that can share blocks
    # shares them only there.
    header = safetensors_header(entries, metadata or None, align=_ALIGNMENT, remainder=data_start)
    with path.open("wb") as out:
        out.write(header)
        out.flush()
        for tensor in Bar(tensors, desc=f"writing {path.name}", unit=" tensors", leave=False):
            _write_tensor(out.fileno(), tensor)


def _write_tensor(out: int, tensor: _Tensor) -> None:
    """Append one tensor; the file offset of `out` is its start."""
    start = os.lseek(out, 0, os.SEEK_CUR)
    change = tensor.change
    with tensor.source.file.open("rb") as file:
        _copy_range(file.fileno(), tensor.source.offset, out, start, tensor.source.nbytes)
    if change is not None:
        # Rows beyond the source's end are all in `rows`, so the tensor has no hole.
        for row, values in change.rows.items():
            _write_at(out, values, start + row * len(values))
    os.lseek(out, start + tensor.nbytes, os.SEEK_SET)


def _copy_range(source: int, offset: int, target: int, position: int, count: int) -> None:
    """Copy bytes between files: shared where the file system can, inside the kernel where it can."""
    count_shared = _share_range(source, offset, target, position, count)
    offset, position, count = offset + count_shared, position + count_shared, count - count_shared
    while count:
        try:
            in_kernel = hasattr(os, "copy_file_range")  # not on macOS
            done = os.copy_file_range(source, target, min(count, 1 << 30), offset, position) if in_kernel else 0
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = 0
        if done == 0:
            _copy_by_reading(source, offset, target, position, count)
            return
        offset, position, count = offset + done, position + done, count - done


def _share_range(source: int, offset: int, target: int, position: int, count: int) -> int:
    """Share whole blocks (FICLONERANGE); return how many bytes from the start are done."""
    lead = -offset % _ALIGNMENT
    whole = (count - lead) // _ALIGNMENT * _ALIGNMENT
    if whole < 16 * _ALIGNMENT or (offset - position) % _ALIGNMENT:
        return 0
    request = np.array([source, offset + lead, whole, position + lead], np.int64).tobytes()
    try:
        fcntl.ioctl(target, _FICLONERANGE, request)
    except OSError:
        return 0
    _copy_by_reading(source, offset, target, position, lead)
    return lead + whole


def _copy_by_reading(source: int, offset: int, target: int, position: int, count: int) -> None:
    buffer = memoryview(bytearray(min(count, BLOCK)))
    while count:
        done = os.preadv(source, [buffer[: min(count, BLOCK)]], offset)
        if done == 0:
            raise OSError(errno.EIO, "a weight file ended early; it may have been changed meanwhile")
        _write_at(target, buffer[:done], position)
        offset, position, count = offset + done, position + done, count - done


def _write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    rest = memoryview(data)
    while len(rest):
        done = os.pwrite(descriptor, rest, position)
        rest, position = rest[done:], position + done


def _write_index(plan: BakePlan, folder: Path) -> None:
    """Write the index where the base model has one, from what the files hold: a new head, the new total."""
    source = plan.checkpoint.folder / INDEX_FILE
    if not source.is_file():
        return
    index = read_json_table(source)
    locations: dict[str, TensorLocation] = {}
    for file in plan.checkpoint.weight_files:
        locations |= read_header(folder / file.name)[0]
    weight_map = {name: location.file.name for name, location in locations.items()}
    absent = [name for name in index["weight_map"] if name not in weight_map]
    needed = [name for name in absent if len(absent) == len(index["weight_map"]) or _is_needed(name, plan)]
    if needed:
        raise DttError(f"{source} names {needed[0]}, which none of its files holds; download the checkpoint again.")
    if absent:
        logger.warning(
            "%s names %d tensors that none of its files holds (%s ...), all beside the model's own layers; the "
            "index of the defended checkpoint leaves them out.",
            source,
            len(absent),
            absent[0],
        )
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(location.nbytes for location in locations.values())
    metadata.pop("total_parameters", None)
    text = json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _is_needed(name: str, plan: BakePlan) -> bool:
    """Return whether the model can't be whole without the tensor `name`.

    It can without layers beyond its own (for multi-token prediction), without positions that are computed, and
    without parts of which it has no tensor at all.
    """
    if name.endswith(HEAD_NAMES):
        return not is_copy(name)
    config = plan.checkpoint.config()
    n_layers = config.get("num_hidden_layers")
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if name.endswith("rotary_emb.inv_freq") or (layer and type(n_layers) is int and int(layer[1]) >= n_layers):
        return False
    return any(other.split(".")[0] == name.split(".")[0] for other in plan.checkpoint.tensors())


def blocks(location: TensorLocation) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Yield a tensor's raw bytes as (start, block), in one buffer that is used again."""
    buffer = np.empty(min(BLOCK, location.nbytes), np.uint8)
    for start in range(0, location.nbytes, BLOCK):
        part = buffer[: min(BLOCK, location.nbytes - start)]
        location.read_into(part, start)
        yield start, part
