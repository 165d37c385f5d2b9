"""Where DefensiveTokens lie: their norms beside the vocabulary's, their directions, their main plane."""

from __future__ import annotations

import os.path
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.arrays import Float64, Int64
from dtt_plugin.checkpoint.opening import Checkpoint, open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import printable
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, upstream_models

_CHUNK_ROWS = 8192
QUANTILES = (0.01, 0.5, 0.99)


@dataclass(frozen=True)
class Geometry:
    """The DefensiveTokens of one embedding space, from any number of token files."""

    model: str
    """Whose embedding space it is."""
    sources: tuple[str, ...]
    """One name per set of tokens: the file's, and the method."""
    source_of: Int64[NDArray[np.int64], " n"]
    """(k,): which of `sources` each token is from."""
    norms: Float64[NDArray[np.float64], " n"]
    """(k,): Euclidean norms, in the embedding's own unit."""
    cosine: Float64[NDArray[np.float64], "n n"]
    """(k, k): cosine of the angle between any two tokens; 0 for a token of norm 0."""
    plane: Float64[NDArray[np.float64], "n 2"]
    """(k, 2): coordinates along the two main components of the centred tokens."""
    explained: tuple[float, float]
    """Share of the variance along each of the two, 0 to 1."""
    vocabulary: tuple[float, float, float] | None
    """The 1 %, 50 % and 99 % quantiles of the vocabulary's norms, where the checkpoint is at hand."""

    @property
    def names(self) -> list[str]:
        """One short name per token: the letter of its source and its place there, such as `B3`."""
        seen: dict[int, int] = {}
        names = []
        for source in self.source_of.tolist():
            names.append(f"{letter(source)}{seen.setdefault(source, 0)}")
            seen[source] += 1
        return names


def letter(source: int) -> str:
    """Return the letter of source 0, 1, 2 ...: A, B, ... Z, AA, AB ..."""
    return (letter(source // 26 - 1) if source >= 26 else "") + chr(ord("A") + source % 26)


def read_geometry(paths: Sequence[Path], problems: list[str], models: Iterable[str] = ()) -> list[Geometry]:
    """Read token files, one `Geometry` per embedding space (same model, same width), in order of appearance.

    Args:
        paths: of token files.
        problems: gets one sentence for each that is none.
        models: that may be at hand. A token file does not tell where its model lies.
    """
    folders = set(models)
    spaces: dict[tuple[str, int], list[tuple[str, DefensiveTokens]]] = {}
    for path in paths:
        try:
            found = _tokens_of(path)
        except DttError as error:
            problems.append(str(error))
            continue
        for tokens in found:
            spaces.setdefault((tokens.model, tokens.width), []).append((f"{path.name} ({tokens.method})", tokens))
    return [_geometry(model, members, folders) for (model, _), members in spaces.items()]


def _tokens_of(path: Path) -> list[DefensiveTokens]:
    if path.suffix != ".json":
        return [load_tokens(path)]
    return [load_tokens(path, model=model) for model in upstream_models(path)]


def _geometry(model: str, members: Sequence[tuple[str, DefensiveTokens]], folders: Collection[str]) -> Geometry:
    rows = np.concatenate([tokens.rows for _, tokens in members]).astype(np.float64)
    named = [folder for folder in folders if public_name(folder) == model]
    norms = np.linalg.norm(rows, axis=1)
    directions = rows / np.where(norms > 0, norms, 1)[:, None]
    centred = rows - rows.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    # One token, or a space one wide, has fewer than two components: the missing coordinates are 0.
    plane = np.zeros((len(rows), 2))
    count = min(2, len(singular))
    plane[:, :count] = left[:, :count] * singular[:count]
    # The sign of a component is arbitrary; fix it, so that the figure is the same on every machine.
    largest = np.abs(plane).argmax(axis=0)
    plane *= np.where(plane[largest, [0, 1]] < 0, -1.0, 1.0)
    variance = np.zeros(2)
    if singular.any():
        variance[:count] = (singular**2 / (singular**2).sum())[:count]
    return Geometry(
        model=printable(model),
        sources=tuple(printable(name) for name, _ in members),
        source_of=np.repeat(np.arange(len(members)), [tokens.k for _, tokens in members]),
        norms=norms,
        cosine=np.clip(directions @ directions.T, -1, 1),
        plane=plane,
        explained=(float(variance[0]), float(variance[1])),
        vocabulary=_vocabulary_norms(named[0] if len(named) == 1 else model, rows.shape[1]),
    )


def _vocabulary_norms(model: str, width: int) -> tuple[float, float, float] | None:
    """Return the `QUANTILES` of the norms of `model`'s embedding rows; None where it isn't on this disk or fits not."""
    try:
        embedding = _local_checkpoint(model).input_embedding()
        if embedding.shape[1] != width:
            return None
        count = embedding.shape[0]
        chunks = (embedding.read_rows(start, min(start + _CHUNK_ROWS, count)) for start in range(0, count, _CHUNK_ROWS))
        norms = np.concatenate([np.linalg.norm(chunk.astype(np.float32), axis=1) for chunk in chunks])
    except DttError:
        return None
    low, middle, high = np.quantile(norms, QUANTILES)
    return float(low), float(middle), float(high)


def _local_checkpoint(model: str) -> Checkpoint:
    """Open the checkpoint of `model` without the network: a report is no reason to download gigabytes."""
    if not os.path.exists(os.path.expanduser(model)):  # False, too, for what can be no path
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            model = snapshot_download(model, local_files_only=True)
        except (HFValidationError, LocalEntryNotFoundError) as error:
            raise DttError(f"{model} is not on this machine; give a local folder.") from error
    return open_checkpoint(model)
