"""Safetensors files without the library: checked headers, reads by rows, reproducible bytes.

Plain reads instead of a memory map keep the resident memory at what is asked
for, and a writer of our own makes the same contents the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import open_regular, parse_json

# Names that a safetensors header may use for a tensor's type.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

# 210,000 quantized tensors of the largest mixtures of experts, in one file, have a header of 28 MB; such models
# come in dozens of files.
_LONGEST_HEADER = 32 << 20
_MOST_TENSORS = 250_000
_MOST_DIMENSIONS = 32
_LARGEST_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies in a safetensors file, and how to read it."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: BF16, F16, F32 ..."""
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the start of the file."""
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stored type; bfloat16 and float8 come from ml_dtypes."""
        if self.dtype not in DTYPES:
            raise DttError(f"{self.name} in {self.file} has the type {self.dtype}, which can't be read.")
        dtype: np.dtype[Any] = np.dtype(DTYPES[self.dtype])
        return dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row (one entry of the first dimension)."""
        return math.prod(self.shape[1:]) * self.numpy_dtype.itemsize

    def read(self) -> NDArray[Any]:
        """Read the whole tensor, in the stored type."""
        return self.read_rows(0, self.shape[0]) if self.shape else self._read(0, self.nbytes).reshape(())

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Read the rows start..stop-1: (stop - start, ...) in the stored type.

        Raises:
            DttError: the file ends before the rows do.
        """
        values = self._read(start * self.row_nbytes, (stop - start) * self.row_nbytes)
        return values.reshape(stop - start, *self.shape[1:])

    def read_rows_at(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read the rows numbered `rows` in that order: (len(rows), ...) in the stored type; into `out`, if given."""
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.numpy_dtype)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        view = out.view(np.uint8).reshape(-1)
        with self._open() as descriptor:
            for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
                part = view[first * self.row_nbytes : last * self.row_nbytes]
                self._fill(descriptor, part, self.offset + int(rows[first]) * self.row_nbytes if len(rows) else 0)
        return out

    def read_into(self, buffer: NDArray[np.uint8], start: int) -> None:
        """Fill `buffer` with the tensor's raw bytes from byte `start` on."""
        with self._open() as descriptor:
            self._fill(descriptor, buffer, self.offset + start)

    def _read(self, start: int, nbytes: int) -> NDArray[Any]:
        try:
            out = np.empty(nbytes, np.uint8)
        except MemoryError as error:
            raise DttError(f"{self.name} in {self.file} has {nbytes >> 20} MB, more than the memory holds.") from error
        self.read_into(out, start)
        return out.view(self.numpy_dtype)

    def _open(self) -> _Descriptor:
        return _Descriptor(self.file)

    def _fill(self, descriptor: int, buffer: NDArray[np.uint8], position: int) -> None:
        """Fill `buffer` from `position`; a single read may return less than was asked for."""
        rest = buffer.data
        while len(rest):
            count = os.preadv(descriptor, [rest], position)
            if count == 0:
                raise DttError(f"{self.file} ends inside the tensor {self.name}: it is truncated; download it again.")
            rest = rest[count:]
            position += count


class _Descriptor:
    """An open file descriptor that closes itself."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.file, os.O_RDONLY)
        except OSError as error:
            raise DttError(f"{self.file} can't be read: {error.strerror}.") from error
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def read_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Read and check the header of the safetensors file `path`.

    Returns:
        Where each tensor lies, and the string metadata.

    Raises:
        DttError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    header, data_start, data_nbytes = _raw_header(path)
    metadata = _metadata(path, header.pop("__metadata__", None))
    if len(header) > _MOST_TENSORS:
        raise DttError(f"{path} lists {len(header)} tensors, more than {_MOST_TENSORS}; this is no model's file.")
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _location(path, name, entry, data_start, data_nbytes)
    end = max((t.offset + t.nbytes for t in tensors.values()), default=data_start) - data_start
    if end != data_nbytes:
        raise _corrupt(path, f"it has {data_nbytes} bytes of data where its header says {end}")
    if sum(t.nbytes for t in tensors.values()) != data_nbytes:
        raise _corrupt(path, "its tensors overlap or leave gaps")
    return tensors, metadata


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    """Check the header's metadata; null is none, as for the safetensors library."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise _corrupt(path, "its metadata is not a table")
    if any(isinstance(value, dict | list) for value in metadata.values()):
        raise _corrupt(path, "its metadata holds more than texts")
    return {key: str(value) for key, value in metadata.items()}


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header as JSON, where the data starts, and how many bytes of data there are."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
            size = os.fstat(file.fileno()).st_size
            if start.startswith(b"version "):
                raise DttError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` there.")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise _corrupt(path, f"{size} bytes can't hold the header it announces")
            if length > _LONGEST_HEADER:
                raise DttError(f"{path} announces a header of {length >> 20} MB; this is no model's file.")
            text = file.read(length)
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}.") from error
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _corrupt(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a table")
    return header, 8 + length, size - 8 - length


def _location(path: Path, name: str, entry: Any, data_start: int, data_nbytes: int) -> TensorLocation:
    """Check one entry of the header of `path`."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(path, f"the entry of the tensor {name!r} is not complete") from error
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise _corrupt(path, f"the entry of the tensor {name!r} is not one of a tensor")
    if len(shape) > _MOST_DIMENSIONS:
        raise _corrupt(path, f"the tensor {name!r} has {len(shape)} dimensions")
    if any(type(number) is not int or not 0 <= number <= _LARGEST_NUMBER for number in (*shape, start, stop)):
        raise _corrupt(path, f"the tensor {name!r} has a size that is not a whole number")
    if dtype not in DTYPES and start <= stop <= data_nbytes:
        # Four-bit and other rare types: the tensor may be unused, so only its reading must fail.
        return TensorLocation(name, path, dtype, tuple(shape), data_start + start, stop - start)
    nbytes = math.prod(shape) * np.dtype(DTYPES.get(dtype, np.uint8)).itemsize
    if stop - start != nbytes:
        raise _corrupt(path, f"the tensor {name!r} should have {nbytes} bytes and has {stop - start}")
    if stop > data_nbytes:
        raise _corrupt(path, f"the tensor {name!r} ends {stop - data_nbytes} bytes after the file does")
    return TensorLocation(name, path, dtype, tuple(shape), data_start + start, nbytes)


def _corrupt(path: Path, why: str) -> DttError:
    return DttError(f"{path} is not a whole safetensors file ({why}); download it again.")


def safetensors_header(
    entries: Iterable[tuple[str, str, Sequence[int], int]],
    metadata: Mapping[str, str] | None = None,
    *,
    align: int = 8,
    remainder: int = 0,
) -> bytes:
    """Return what stands in front of the data of a safetensors file: the header's length and the header.

    Args:
        entries: name, dtype as the format spells it, shape and size in bytes of each tensor, in the order of the data.
        metadata: in this order; none is no entry.
        align: the data start at `remainder` modulo this.
        remainder: see `align`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((remainder - 8 - len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write float32/float64 arrays as safetensors whose bytes depend on the contents alone.

    The library's writer keeps the metadata in a hash map, whose order changes from run to run.
    """
    names = {"float32": "F32", "float64": "F64"}
    entries = [(name, names[tensor.dtype.name], tensor.shape, tensor.nbytes) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        file.write(safetensors_header(entries, dict(sorted(metadata.items()))))
        for tensor in tensors.values():
            little_endian = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
            file.write(little_endian.data.cast("B"))
