"""Reading a defended checkpoint back, before it gets its name."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dtt_plugin.bake.plan import AT_ONCE, BakePlan, TensorChange
from dtt_plugin.bake.weights import BLOCK, blocks, indexed_tensors
from dtt_plugin.checkpoint.families import text_configs
from dtt_plugin.checkpoint.folder import read_json_table
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.errors import DttError
from dtt_plugin.progress import Bar


def verify(plan: BakePlan, folder: Path) -> dict[str, str]:
    """Check a written checkpoint against its plan.

    Every changed tensor is read back, every other one is the same file or the same bytes, and the configuration
    agrees with the shapes.

    Returns:
        SHA-256 of every changed tensor's bytes.

    Raises:
        DttError: something differs.
    """
    base, result = plan.checkpoint.tensors(), indexed_tensors(folder)
    changes = {change.name: change for change in plan.changes}
    if result.keys() != base.keys() | changes.keys():
        raise _differs(folder, f"the tensors {sorted(result.keys() ^ (base.keys() | changes.keys()))[:3]}")

    def check(location: TensorLocation) -> str | None:
        if location.name in changes:
            return _check_changed(location, changes[location.name])
        if not _same_file(location, base[location.name]):
            _check_equal(location, base[location.name])
        return None

    # Reading, comparing and hashing all leave the interpreter, so tensors are checked side by side.
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="dtt-verify") as pool:
        checked = Bar(
            pool.map(check, result.values()), total=len(result), desc="verifying", unit=" tensors", leave=False
        )
        digests = {name: digest for name, digest in zip(result, checked, strict=True) if digest}
    _check_config(folder, plan)
    return digests


def _check_changed(location: TensorLocation, change: TensorChange) -> str:
    """Compare a changed tensor with its source and its new rows; return its SHA-256."""
    if location.shape != change.shape or location.dtype != change.source.dtype:
        raise _differs(location.file, f"the shape of {location.name}")
    digest = hashlib.sha256()
    row_nbytes = location.row_nbytes
    buffer = np.empty(min(BLOCK, location.nbytes), np.uint8)
    for start, block in blocks(location):
        digest.update(block.data)
        expected = buffer[: len(block)]
        unchanged = max(min(change.source.nbytes - start, len(block)), 0)
        change.source.read_into(expected[:unchanged], start)
        expected[unchanged:] = 0
        for row, values in change.rows.items():
            first = row * row_nbytes - start
            if -row_nbytes < first < len(block):
                part = np.frombuffer(values, np.uint8)[max(-first, 0) : len(block) - first]
                expected[max(first, 0) : max(first, 0) + len(part)] = part
        if not np.array_equal(block, expected):
            raise _differs(location.file, f"the values of {location.name}")
    return digest.hexdigest()


def _same_file(location: TensorLocation, base: TensorLocation) -> bool:
    return location.offset == base.offset and location.file.samefile(base.file)


def _check_equal(location: TensorLocation, base: TensorLocation) -> None:
    if (location.shape, location.dtype) != (base.shape, base.dtype):
        raise _differs(location.file, f"the shape of {location.name}")
    buffer = np.empty(min(BLOCK, base.nbytes), np.uint8)
    for start, block in blocks(location):
        base.read_into(buffer[: len(block)], start)
        if not np.array_equal(block, buffer[: len(block)]):
            raise _differs(location.file, f"the values of {location.name}")


def _check_config(folder: Path, plan: BakePlan) -> None:
    config = read_json_table(folder / "config.json")
    if text_configs(config)[-1].get("vocab_size") != plan.n_rows:
        raise _differs(folder / "config.json", "vocab_size")
    if config.get("tie_word_embeddings") is not False:
        raise _differs(folder / "config.json", "tie_word_embeddings")
    suppressed = read_json_table(folder / "generation_config.json").get("suppress_tokens", [])
    if not set(plan.token_ids) <= set(suppressed):
        raise _differs(folder / "generation_config.json", "suppress_tokens")


def _differs(path: Path, what: str) -> DttError:
    return DttError(
        f"Verification failed: {what} in {path.name} is not what was to be written; the base model may "
        "have changed meanwhile, bake again."
    )
