"""The benchmarks' files: found, read, and compared with the ones that are known.

They may not be shipped. Of each record a digest is, so that an altered file is not only refused: the first record that
differs is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dtt_plugin.data.fetch import git_blob_hash
from dtt_plugin.data.records import ASSETS, data_file, read_json
from dtt_plugin.data.sources import BENCHMARKS, Source
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_file
from dtt_plugin.files.reading import parse_json, read_bytes

DIGESTS = ASSETS / "benchmark_digests.json"
_LARGEST = 64 << 20


def benchmark_file(name: str) -> Path:
    """Return the path of a benchmark's file in the data folder.

    Raises:
        DttError: it is not there.
    """
    return data_file(name, fetch=f"dtt fetch --only {_source(name).set}")


def load_benchmark(name: str, *, allow_modified: bool = False) -> Any:
    """Return what a benchmark's file holds: a JSON value, of a `.jsonl` or `.parquet` file the list of its records.

    Args:
        name: as in `sources.BENCHMARKS`.
        allow_modified: accept another content than the known one.

    Raises:
        DttError: the file is missing, unreadable, or not the known one; names the first record that differs.
    """
    path, source = benchmark_file(name), _source(name)
    value = _READERS.get(path.suffix, read_json)(path)
    known = not source.sha256 or sha256_file(path) == source.sha256
    known = known and (not source.git_blob or git_blob_hash(path) == source.git_blob)
    if not known and not allow_modified:
        raise DttError(
            f"{path} is not the known file: {_first_difference(name, value)}; remove it and run"
            f" `dtt fetch --only {source.set}`, or accept it with --metadata '{{\"allow_modified_data\": true}}'."
        )
    return value


def read_json_lines(path: Path) -> list[Any]:
    """Return the JSON values of a file with one a line; empty lines count as none.

    Raises:
        DttError: a line is no JSON; names it.
    """
    try:
        lines = read_bytes(path, most=_LARGEST).split(b"\n")
    except OSError as error:
        raise DttError(f"{path} can't be read ({error.strerror}); restore the file.") from error
    return [_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _line(path: Path, number: int, line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DttError(f"{path}, line {number}, is not JSON ({error}); correct the line.") from error


def read_parquet(path: Path) -> list[Any]:
    """Return the rows of a parquet file as dictionaries.

    Raises:
        DttError: it is no parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DttError(f"{path} can't be read as parquet ({error}); restore the file.") from error
    return rows


_READERS: Mapping[str, Callable[[Path], Any]] = {".jsonl": read_json_lines, ".parquet": read_parquet}


def record_digests(value: Any) -> list[str]:
    """Return a short digest of each record of a benchmark; none where the file is no list."""
    return [_digest(record) for record in value] if isinstance(value, list) else []


def _digest(record: Any) -> str:
    return sha256_bytes(json.dumps(record, ensure_ascii=False, sort_keys=True).encode(errors="surrogatepass"))[:8]


def _first_difference(name: str, value: Any) -> str:
    known = _known_digests().get(name)
    if not known:
        return "its digest differs"
    expected = [known[place : place + 8] for place in range(0, len(known), 8)]
    found = record_digests(value)
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((i for i, (one, other) in pairs if one != other), min(len(found), len(expected)))
    if found == expected:
        return "its records are the known ones, and its bytes differ"
    return f"record {first} differs first ({len(found)} found, {len(expected)} expected)"


@cache
def _known_digests() -> dict[str, str]:
    digests: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    return digests


def _source(name: str) -> Source:
    return next(source for source in BENCHMARKS if source.name == name)
