"""DefensiveTokens: k rows for a model's embedding space, and the two file formats that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.errors import DttError
from dtt_plugin.files import replacing, write_json
from dtt_plugin.formats import FORMAT_OF_PUBLISHED_MODEL, MODEL_FORMAT, check_format
from dtt_plugin.peft_adapter import read_adapter, write_adapter
from dtt_plugin.tensor_files import read_header, write_safetensors

FORMAT = "dtt.tokens/1"
TENSOR = "defensive_tokens"
MOST_TOKENS = 1000
WIDEST = 1_000_000
METHODS = ("native", "procrustes", "copy", "random", "trained", "adapted")
_RESERVED = ("format", "model", "method", "source_model", "prompt_format", "sha256")


@dataclass(frozen=True)
class DefensiveTokens:
    """k DefensiveTokens in the embedding space of one model."""

    rows: NDArray[np.float32]
    """(k, d): one token per row."""
    model: str
    """The model whose embedding space the rows live in."""
    method: str
    """How they came to be: one of `METHODS`."""
    prompt_format: str
    """The prompt format they were trained with, see `dtt_plugin.formats`."""
    source_model: str = ""
    """For transferred tokens: the model they come from."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Anything else that is worth keeping in the file, such as digests."""

    def __post_init__(self) -> None:
        rows = np.ascontiguousarray(self.rows, np.float32)
        object.__setattr__(self, "rows", rows)
        if rows.ndim != 2 or not 1 <= len(rows) <= MOST_TOKENS or not 1 <= rows.shape[1] <= WIDEST:
            raise DttError(
                f"DefensiveTokens are a table of 1 to {MOST_TOKENS} rows, and this one has the shape "
                f"{list(rows.shape)}; check the file."
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise DttError(f"DefensiveToken {bad[0]} holds NaN or infinity; train or transfer it again.")
        if self.method not in METHODS:
            raise DttError(f"method={self.method!r} is not known; it is one of: {', '.join(METHODS)}.")
        check_format(self.prompt_format)

    @property
    def k(self) -> int:
        """Number of tokens."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Width of the embedding space, d."""
        return int(self.rows.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the little-endian float32 values."""
        shape = f"{self.k}x{self.width}:".encode()
        return hashlib.sha256(shape + self.rows.astype("<f4").tobytes()).hexdigest()


def load_tokens(path: str | Path, *, model: str | None = None) -> DefensiveTokens:
    """Read tokens: safetensors as `save_tokens` writes it, the upstream JSON, or a PEFT prompt-tuning adapter.

    Args:
        path: the file, or the adapter's folder.
        model: which model's entry of an upstream JSON; needed where it has several.

    Raises:
        DttError: not a token file, values that can't be tokens, or no such entry.
    """
    path = Path(path)
    if path.is_dir():
        return _checked(path, **read_adapter(path))
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}; give a token file.") from error
    # A safetensors file has its header's length in 8 bytes, then the header's brace.
    if start[8:9] == b"{" and path.suffix != ".json":
        return _load_safetensors(path, model)
    return _load_upstream_json(path, model)


def _load_safetensors(path: Path, model: str | None) -> DefensiveTokens:
    tensors, metadata = read_header(path)
    if metadata.get("format") != FORMAT or TENSOR not in tensors:
        raise DttError(f"{path} is a safetensors file but not a token file ({FORMAT}); make one with `dtt transfer`.")
    location = tensors[TENSOR]
    if location.dtype != "F32" or len(location.shape) != 2 or location.shape[0] > MOST_TOKENS:
        raise DttError(
            f"{path}: {TENSOR} is {location.dtype} {list(location.shape)}, not float32 with "
            f"1 to {MOST_TOKENS} rows; the file is damaged."
        )
    if model and model != metadata.get("model"):
        raise DttError(f"{path} holds tokens for {metadata.get('model')!r}, not for {model!r}.")
    tokens = _checked(
        path,
        rows=location.read(),
        model=metadata.get("model", ""),
        method=metadata.get("method", ""),
        prompt_format=metadata.get("prompt_format", MODEL_FORMAT),
        source_model=metadata.get("source_model", ""),
        metadata={key: value for key, value in metadata.items() if key not in _RESERVED},
    )
    if metadata.get("sha256", tokens.digest) != tokens.digest:
        raise DttError(f"{path}: the values don't match the digest in the file; it is damaged, make it again.")
    return tokens


def upstream_models(path: str | Path) -> list[str]:
    """Return the names of the models whose tokens the upstream JSON `path` holds.

    Raises:
        DttError: not such a file.
    """
    return list(_upstream_table(Path(path)))


def _upstream_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except DttError as error:
        raise DttError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DttError(
            f"{path} is neither a token file ({FORMAT}) nor JSON with tokens; give one of the two."
        ) from error
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}; give a token file.") from error
    if not isinstance(table, dict) or not table:
        raise DttError(f"{path} should hold an object {{model id: [[number, ...], ...]}}; check the file.")
    return table


def _load_upstream_json(path: Path, model: str | None) -> DefensiveTokens:
    table = _upstream_table(path)
    if model is None and len(table) > 1:
        raise DttError(
            f"{path} holds tokens of {len(table)} models ({', '.join(table)}); name one "
            "(tokens_model=..., --tokens-model)."
        )
    name = next(iter(table)) if model is None else model
    if name not in table:
        raise DttError(f"{path} has no tokens of {name!r}; it has: {', '.join(table)}.")
    return _checked(
        path,
        rows=_table_of_numbers(path, name, table[name]),
        model=name,
        method="native",
        prompt_format=FORMAT_OF_PUBLISHED_MODEL.get(name, MODEL_FORMAT),
    )


def _table_of_numbers(path: Path, name: str, rows: Any) -> NDArray[np.float32]:
    """Check that `rows` is a rectangle of numbers before numpy makes something else of it."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise DttError(f"{path}: the entry of {name} is not a list of rows of numbers; check the file.")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise DttError(f"{path}: the rows of {name} have different lengths ({sorted(lengths)}); check the file.")
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise DttError(f"{path}: the entry of {name} holds something that is not a number; check the file.")
    try:
        with np.errstate(over="ignore"):
            return np.array(rows, np.float64).astype(np.float32)
    except OverflowError as error:
        raise DttError(f"{path}: the entry of {name} holds a number beyond float32; check the file.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DttError(f"the name {twice!r} stands there twice; remove one of the two.")
    return table


def _checked(path: Path, **fields: Any) -> DefensiveTokens:
    try:
        return DefensiveTokens(**fields)
    except DttError as error:
        raise DttError(f"{path}: {error}") from error


def save_tokens(path: str | Path, tokens: DefensiveTokens) -> None:
    """Write `tokens` to the safetensors file `path`, atomically; the same tokens give the same bytes.

    Raises:
        DttError: the file can't be written.
    """
    metadata = {
        "format": FORMAT,
        "model": tokens.model,
        "method": tokens.method,
        "source_model": tokens.source_model,
        "prompt_format": tokens.prompt_format,
        "sha256": tokens.digest,
    }
    extra = {key: value for key, value in tokens.metadata.items() if key not in _RESERVED}
    with replacing(Path(path)) as temporary:
        write_safetensors(temporary, {TENSOR: tokens.rows}, {**extra, **metadata})


def save_upstream_json(path: str | Path, tokens_by_model: Mapping[str, NDArray[np.float32]]) -> None:
    """Write `{model: [[float] * d] * k}` as published with the DefensiveTokens paper.

    Args:
        path: the file.
        tokens_by_model: per model its tokens, (k, d).

    Raises:
        DttError: the file can't be written.
    """
    write_json(Path(path), {model: rows.tolist() for model, rows in tokens_by_model.items()})


def save_adapter(folder: str | Path, tokens: DefensiveTokens) -> None:
    """Write `tokens` as a prompt-tuning adapter of PEFT, the new folder `folder`.

    Raises:
        DttError: the folder exists, or a file can't be written.
    """
    fields = ("rows", "model", "method", "source_model", "prompt_format")
    write_adapter(Path(folder), {name: getattr(tokens, name) for name in fields})
