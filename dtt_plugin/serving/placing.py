"""Which ids of a model's vocabulary stand for the DefensiveTokens of which file, without a change of the model.

An id is free if no text and no template yields it: a spare row behind the tokenizer's last token (a padded
vocabulary), or a reserved token that nothing uses; padding that a GGUF file had to name counts among these. An engine
that takes rows of its own for these ids (`dtt_plugin.serving.layer`) then serves any number of token files, told apart
by ids alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens

_STORED: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


class NoFreeIds(DttError):
    """The vocabulary is full: such a model can only be baked."""


class TokenFile(NamedTuple):
    """Where tokens come from."""

    file: str
    entry: str | None = None
    """Which model's entry of a published JSON."""

    @property
    def name(self) -> str:
        """What requests call the tokens: the file's name without its endings."""
        name = Path(self.file).name
        for ending in (".safetensors", ".json", ".tokens"):
            name = name.removesuffix(ending)
        return name


@dataclass(frozen=True)
class Placed:
    """The tokens of one file, and their ids."""

    source: TokenFile
    tokens: DefensiveTokens
    ids: tuple[int, ...]


@dataclass(frozen=True)
class FreeIds:
    """The ids of a model's vocabulary that DefensiveTokens may take."""

    spare: tuple[int, ...]
    """Rows behind the tokenizer's last token, ascending: those that `dtt bake` takes first."""
    reserved: tuple[int, ...]
    """Of reserved tokens, ascending: those that `dtt bake --reuse-reserved` takes from the end."""

    def __len__(self) -> int:
        return len(self.spare) + len(self.reserved)


@dataclass(frozen=True)
class Placement:
    """Every file's tokens in the vocabulary of one model."""

    placed: tuple[Placed, ...]
    stored: str
    """The type of the model's embedding in its files, in which a baked checkpoint would have the rows."""

    @property
    def ids(self) -> list[int]:
        """All ids that stand for a DefensiveToken."""
        return [token_id for placed in self.placed for token_id in placed.ids]

    def ids_of(self, tokens: DefensiveTokens) -> tuple[int, ...] | None:
        """Return the ids of tokens with these values, if they were placed."""
        digest = tokens.digest
        return next((placed.ids for placed in self.placed if placed.tokens.digest == digest), None)

    def to_config(self) -> dict[str, Any]:
        """Return what an engine's processes need to know, as plain values for `additional_config`."""
        files = [
            {"file": p.source.file, "entry": p.source.entry, "sha256": p.tokens.digest, "ids": list(p.ids)}
            for p in self.placed
        ]
        return {"stored": self.stored, "placed": files}


def free_ids(tokenizer: TokenizerFiles, n_rows: int) -> FreeIds:
    """Return the ids that are free in a model's vocabulary.

    Args:
        tokenizer: the base model's.
        n_rows: of its embedding.
    """
    (start,) = tokenizer.next_ids(1)
    return FreeIds(tuple(range(start, n_rows)), tuple(i for i in tokenizer.unused_reserved_ids() if i < n_rows))


def assign(free: FreeIds, sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Return ids for token files of these numbers of tokens, each within one kind; None where they are too few."""
    spare, reserved = free.spare, free.reserved
    assigned = []
    for k in sizes:
        if len(spare) >= k:
            ids, spare = spare[:k], spare[k:]
        elif len(reserved) >= k:
            ids, reserved = reserved[-k:], reserved[:-k]
        else:
            return None
        assigned.append(ids)
    return assigned


def have_room(model: str, sizes: Sequence[int], *, revision: str | None = None) -> bool:
    """Return whether token files of these numbers of tokens have free ids, by a model's small files alone.

    Raises:
        DttError: the files can't be read.
    """
    checkpoint = open_checkpoint(model, revision=revision, need="tokenizer")
    config = checkpoint.config()
    n_rows = (config.get("text_config") or config).get("vocab_size")
    return type(n_rows) is int and assign(free_ids(TokenizerFiles(checkpoint.folder), n_rows), sizes) is not None


def place(model: str, files: Iterable[TokenFile], *, revision: str | None = None) -> Placement:
    """Give the tokens of every file ids of their own in the vocabulary of `model`.

    The first file's ids are those that `dtt bake` would take, where its vocabulary has the room.

    Args:
        model: the base model: a folder or a hub id.
        files: token files; the same values twice are placed once.
        revision: of a hub id.

    Raises:
        NoFreeIds: the vocabulary has fewer free ids than are needed; the sentence has both numbers.
        DttError: a token file is damaged or of another width, or the model has DefensiveTokens already.
    """
    checkpoint = open_checkpoint(model, revision=revision, need="embeddings")
    embedding = checkpoint.input_embedding()
    tokenizer = TokenizerFiles(checkpoint.folder)
    if tokenizer.defended:
        raise DttError(f"{checkpoint.name} already has DefensiveTokens; give the base model it was made from.")
    loaded: dict[str, tuple[TokenFile, DefensiveTokens]] = {}
    for source in files:
        tokens = load_tokens(source.file, model=source.entry)
        if tokens.width != embedding.shape[1]:
            raise DttError(
                f"The tokens in {source.file} have width {tokens.width} and {checkpoint.name} has width "
                f"{embedding.shape[1]}; they were made for {tokens.model or 'another model'}: transfer them with "
                "`dtt transfer`."
            )
        stored_rows(tokens, embedding.dtype)
        loaded.setdefault(tokens.digest, (TokenFile(os.path.abspath(source.file), source.entry), tokens))
    free, sizes = free_ids(tokenizer, embedding.shape[0]), [tokens.k for _, tokens in loaded.values()]
    if (assigned := assign(free, sizes)) is None:
        raise NoFreeIds(
            f"The vocabulary of {checkpoint.name} has {len(free)} free ids and {sum(sizes)} are needed, so a running "
            "engine can't take these tokens beside the base model; bake them (dtt_vllm does so by itself)."
        )
    placed = [Placed(*file, ids) for file, ids in zip(loaded.values(), assigned, strict=True)]
    return Placement(tuple(placed), embedding.dtype)


def route(model: str, *, revision: str | None = None) -> str:
    """Return how vLLM can have DefensiveTokens of this model, in words: beside it, baked into it, or not at all."""
    try:
        checkpoint = open_checkpoint(model, revision=revision, need="embeddings")
        tokenizer = TokenizerFiles(checkpoint.folder)
        free = free_ids(tokenizer, checkpoint.input_embedding().shape[0])
    except DttError as error:
        return f"not at all: {error}"
    if tokenizer.defended:
        return "not at all: it has them already"
    kinds = f"{len(free.spare)} spare rows, {len(free.reserved)} unused reserved tokens"
    return f"beside the model ({kinds})" if len(free) else f"baked: its vocabulary has no free ids ({kinds})"


def stored_rows(tokens: DefensiveTokens, stored: str) -> NDArray[np.float32]:
    """Return the rows as a baked checkpoint's files would hold them, float32 [k, d].

    Args:
        tokens: (k, d).
        stored: the safetensors type of the model's embedding; one of integers (quantized) holds no such rows.

    Raises:
        DttError: a value does not fit the type.
    """
    if stored not in _STORED:
        return tokens.rows
    with np.errstate(over="ignore"):  # said below, in words
        rows: NDArray[np.float32] = tokens.rows.astype(_STORED[stored]).astype(np.float32)
    if not np.isfinite(rows).all():
        raise DttError(
            f"A DefensiveToken does not fit the type of the embedding ({stored}); check that the tokens were made for "
            "this model."
        )
    return rows


def rows_of_config(config: Mapping[str, Any]) -> tuple[list[int], NDArray[np.float32]]:
    """Read the rows that `Placement.to_config` describes: their ids, and float32 [all k, d].

    Raises:
        DttError: a file is not what it was when the engine was configured.
    """
    ids: list[int] = []
    rows = []
    for entry in config["placed"]:
        tokens = load_tokens(entry["file"], model=entry["entry"])
        if tokens.digest != entry["sha256"]:
            raise DttError(f"{entry['file']} was changed while the engine started; start it again.")
        ids += entry["ids"]
        rows.append(stored_rows(tokens, config["stored"]))
    return ids, np.concatenate(rows)
