"""DefensiveTokens: k rows for a model's embedding space, and the two file formats that hold them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.arrays import Float32
from dtt_plugin.checkpoint.defended import MOST_TOKENS
from dtt_plugin.checkpoint.tensors import FLOAT_DTYPES, TensorLocation, read_header, write_safetensors
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import open_regular, read_json
from dtt_plugin.files.replacing import replacing, write_json
from dtt_plugin.prompt.formats import FORMAT_OF_PUBLISHED_MODEL, MODEL_FORMAT, check_format
from dtt_plugin.public_names import public_name, public_text
from dtt_plugin.safe_text import HALF_PAIR
from dtt_plugin.tokens.methods import METHODS
from dtt_plugin.tokens.peft import read_adapter, write_adapter
from dtt_plugin.tokens.training_log import train_seconds

FORMAT = "dtt.tokens/1"
TENSOR = "defensive_tokens"
MOST_MODELS = 1000
MOST_VALUES = 1 << 24
"""1,000 tokens as wide as the widest models' embeddings, 16,384."""
_UPSTREAM_METADATA = "__metadata__"  # as in a safetensors header; no model is called so
_RESERVED = ("format", "model", "method", "source_model", "prompt_format", "sha256")


@dataclass(frozen=True)
class DefensiveTokens:
    """k DefensiveTokens in the embedding space of one model."""

    rows: Float32[NDArray[np.float32], "k d"]
    """(k, d): one token per row."""
    model: str
    """The model whose embedding space the rows live in."""
    method: str
    """How they came to be: one of `dtt_plugin.tokens.methods.METHODS`."""
    prompt_format: str
    """The prompt format they were trained with, see `dtt_plugin.prompt.formats`."""
    source_model: str = ""
    """For transferred tokens: the model they come from."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Anything else that is worth keeping in the file, such as digests."""

    def __post_init__(self) -> None:
        rows = np.ascontiguousarray(self.rows, np.float32)
        object.__setattr__(self, "rows", rows)
        if not _can_be_tokens(rows.shape):
            raise DttError(
                f"DefensiveTokens are a table of 1 to {MOST_TOKENS} rows and at most {MOST_VALUES} values, and this "
                f"one has the shape {list(rows.shape)}; check the file."
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise DttError(f"DefensiveToken {bad[0]} holds NaN or infinity; train or transfer it again.")
        if self.method not in METHODS:
            raise DttError(f"method={self.method!r} is not known; it is one of: {', '.join(METHODS)}.")
        check_format(self.prompt_format)
        for text in (self.model, self.source_model, *self.metadata, *self.metadata.values()):
            if HALF_PAIR.search(text):
                raise DttError(f"{text!r} among their names and metadata is no text in UTF-8; correct it.")

    @property
    def k(self) -> int:
        """Number of tokens."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Width of the embedding space, d."""
        return int(self.rows.shape[1])

    def check_width(self, width: int, *, name: object, model: str) -> None:
        """Refuse a model of another width.

        Args:
            width: of the model's embedding.
            name: what the tokens are called, such as their file.
            model: the model's name.

        Raises:
            DttError: the widths differ.
        """
        if self.width != width:
            raise DttError(
                f"{name} has rows of width {self.width} (made for {self.model}), {model} has width {width}; transfer"
                " them first with `dtt align` and `dtt transfer`."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the shape and the little-endian float32 values."""
        shape = f"{self.k}x{self.width}:".encode()
        return hashlib.sha256(shape + self.rows.astype("<f4").tobytes()).hexdigest()


def _can_be_tokens(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and 1 <= shape[0] <= MOST_TOKENS and 1 <= shape[0] * shape[1] <= MOST_VALUES


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
        location, base_model, metadata = read_adapter(path)
        fields = _fields(metadata, method="trained", prompt_format=MODEL_FORMAT)
        return _checked(path, rows=_read_rows(location, FLOAT_DTYPES), model=base_model, **fields)
    try:
        with open_regular(path) as file:
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
    if model and public_name(model) != public_name(metadata.get("model", "")):
        raise DttError(f"{path} holds tokens for {metadata.get('model')!r}, not for {model!r}.")
    tokens = _checked(
        path,
        rows=_read_rows(tensors[TENSOR], {"F32"}),
        model=metadata.get("model", ""),
        **_fields(metadata, method="", prompt_format=MODEL_FORMAT),
    )
    if metadata.get("sha256", tokens.digest) != tokens.digest:
        raise DttError(f"{path}: the values don't match the digest in the file; it is damaged, make it again.")
    seconds = train_seconds(path, tokens.digest)
    return tokens if seconds is None else replace(tokens, metadata={**tokens.metadata, "train_seconds": str(seconds)})


def _read_rows(location: TensorLocation, dtypes: Set[str]) -> Float32[NDArray[np.float32], "k d"]:
    """Read the tokens in `location` as float32; its size is checked first."""
    if location.dtype not in dtypes or not _can_be_tokens(location.shape):
        kind = "float32" if len(dtypes) == 1 else "floating point"
        raise DttError(
            f"{location.file}: {location.name} is {location.dtype} {list(location.shape)}, not {kind} with 1 to "
            f"{MOST_TOKENS} rows and at most {MOST_VALUES} values; the file is damaged."
        )
    with np.errstate(over="ignore"):
        return location.read().astype(np.float32)


def upstream_models(path: str | Path) -> list[str]:
    """Return the names of the models whose tokens the upstream JSON `path` holds.

    Raises:
        DttError: not such a file.
    """
    return list(_upstream_table(Path(path))[0])


def _upstream_table(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries by model, and what `save_upstream_json` noted about each."""
    try:
        table = read_json(path, pairs_hook=_without_duplicates)
    except _TwiceError as error:
        raise DttError(f"{path}: the name {error.args[0]!r} stands there twice; remove one of the two.") from error
    except ValueError as error:
        raise DttError(
            f"{path} is neither a token file ({FORMAT}) nor JSON with tokens; give one of the two."
        ) from error
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}; give a token file.") from error
    notes = table.pop(_UPSTREAM_METADATA, {}) if isinstance(table, dict) else None
    if not table or not isinstance(notes, dict):
        raise DttError(f"{path} should hold an object {{model id: [[number, ...], ...]}}; check the file.")
    if len(table) > MOST_MODELS:
        raise DttError(f"{path} holds the tokens of {len(table)} models, more than {MOST_MODELS}; check the file.")
    return table, notes


def load_every_upstream(path: str | Path) -> list[DefensiveTokens]:
    """Read the tokens of every model in the upstream JSON `path`.

    Raises:
        DttError: not such a file, or values that can't be tokens.
    """
    path = Path(path)
    table, notes = _upstream_table(path)
    return [_upstream_entry(path, name, table[name], notes) for name in table]


def _load_upstream_json(path: Path, model: str | None) -> DefensiveTokens:
    table, notes = _upstream_table(path)
    if model is None and len(table) > 1:
        raise DttError(
            f"{path} holds tokens of {len(table)} models ({', '.join(table)}); name one "
            "(tokens_model=..., --tokens-model)."
        )
    name = next(iter(table)) if model is None else model
    if name not in table:
        raise DttError(f"{path} has no tokens of {name!r}; it has: {', '.join(table)}.")
    return _upstream_entry(path, name, table[name], notes)


def _upstream_entry(path: Path, name: str, rows: Any, notes: dict[str, Any]) -> DefensiveTokens:
    note = notes.get(name, {})
    if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
        raise DttError(f"{path}: what {_UPSTREAM_METADATA} says about {name} is not a table of texts; check the file.")
    return _checked(
        path, rows=_table_of_numbers(path, name, rows), model=name, **_fields(note, **_fields_of_published(name))
    )


def _fields_of_published(model: str) -> dict[str, Any]:
    """Return what an entry of the published JSON is where nothing else is noted."""
    return {"method": "native", "prompt_format": FORMAT_OF_PUBLISHED_MODEL.get(model, MODEL_FORMAT)}


def _fields(metadata: Mapping[str, str], **defaults: Any) -> dict[str, Any]:
    """Return the fields of `DefensiveTokens` that a file's metadata hold: three by name, the rest as they are."""
    named = {"source_model": "", **defaults}
    return {
        **{name: metadata.get(name, default) for name, default in named.items()},
        "metadata": {key: value for key, value in metadata.items() if key not in _RESERVED},
    }


def _table_of_numbers(path: Path, name: str, rows: Any) -> Float32[NDArray[np.float32], "k d"]:
    """Check that `rows` is a rectangle of numbers before numpy makes something else of it."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise DttError(f"{path}: the entry of {name} is not a list of rows of numbers; check the file.")
    if not _can_be_tokens((len(rows), max(map(len, rows)))):
        raise DttError(
            f"{path}: the entry of {name} has {len(rows)} rows of up to {max(map(len, rows))} numbers, not 1 to "
            f"{MOST_TOKENS} rows with at most {MOST_VALUES} values; check the file."
        )
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


class _TwiceError(ValueError):
    """A name stands twice in a JSON table; the argument is the name."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
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
    metadata = {**_noted(tokens), "format": FORMAT, "model": public_name(tokens.model), "sha256": tokens.digest}
    with replacing(Path(path)) as temporary:
        write_safetensors(temporary, {TENSOR: tokens.rows}, metadata)


def _noted(tokens: DefensiveTokens) -> dict[str, str]:
    """Return what a file says about the tokens beside their model and values; no path of this machine."""
    return {
        **{key: public_text(value) for key, value in tokens.metadata.items() if key not in _RESERVED},
        "method": tokens.method,
        "source_model": public_name(tokens.source_model),
        "prompt_format": tokens.prompt_format,
    }


def save_upstream_json(
    path: str | Path,
    tokens_by_model: Mapping[str, Float32[NDArray[np.float32], "_ _"]],
    notes: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write `{model: [[float] * d] * k}` as published with the DefensiveTokens paper.

    Args:
        path: the file.
        tokens_by_model: per model its tokens, (k, d).
        notes: per model what that format has no place for; an entry of its own, which its readers pass over.

    Raises:
        DttError: the file can't be written.
    """
    table: dict[str, Any] = {_UPSTREAM_METADATA: notes} if notes else {}
    write_json(Path(path), table | {model: rows.tolist() for model, rows in tokens_by_model.items()})


def save_as_upstream_json(path: str | Path, tokens: DefensiveTokens) -> None:
    """Write `tokens` as the published JSON; how they came to be is noted where the format would say otherwise.

    Raises:
        DttError: the file can't be written.
    """
    model = public_name(tokens.model)
    plain = replace(tokens, source_model="", metadata={}, **_fields_of_published(model))
    noted = _noted(tokens)
    save_upstream_json(path, {model: tokens.rows}, None if noted == _noted(plain) else {model: noted})


def save_adapter(folder: str | Path, tokens: DefensiveTokens) -> None:
    """Write `tokens` as a prompt-tuning adapter of PEFT, the new folder `folder`.

    Raises:
        DttError: the folder exists, or a file can't be written.
    """
    write_adapter(Path(folder), tokens.rows, public_name(tokens.model), _noted(tokens))
