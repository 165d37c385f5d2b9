"""Which pairs of rows anchor an alignment: the tokens that two vocabularies share."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.options import AlignmentOptions
from dtt_plugin.arrays import Bool
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.checkpoint.vocabulary import Vocabulary
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import parse_json, read_bytes

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Anchors:
    """Pairs of rows that stand for the same token, in the order of the source's rows."""

    source_rows: Rows
    """(n,)"""
    target_rows: Rows
    """(n,)"""
    held_out: Bool[NDArray[np.bool_], " n"]
    """(n,): the seeded share that the diagnostics hold out."""
    n_shared: int
    """Shared tokens before any sampling."""
    share: float
    """Shared tokens over the smaller vocabulary's tokens, 0..1."""
    special_left_out: tuple[str, ...]
    """Special tokens that only one of the two has."""


def choose_anchors(
    source: Vocabulary | None,
    target: Vocabulary | None,
    source_embedding: TensorLocation,
    target_embedding: TensorLocation,
    options: AlignmentOptions,
) -> Anchors:
    """Return the anchors of a pair of models.

    Args:
        source: its vocabulary; None with `options.match == "rows"`.
        target: likewise.
        source_embedding: [rows, d_s]; tokens beyond its rows don't count.
        target_embedding: [rows, d_t].
        options: how to match and sample.

    Raises:
        DttError: too few shared tokens to determine the map.
    """
    left_out: tuple[str, ...] = ()
    if source is None or target is None:
        pairs, share = _by_row_number(source_embedding, target_embedding), 1.0
    else:
        pairs, share = _by_token(source, target, source_embedding.shape[0], target_embedding.shape[0])
        left_out = tuple(sorted(source.special.keys() ^ target.special.keys()))
    n_shared = len(pairs)
    if n_shared == 0:
        raise DttError(
            "The two vocabularies share no token, so there is nothing to align by; choose models whose "
            "tokenizers overlap."
        )
    if options.anchors_file is not None and source is not None:
        pairs = pairs[np.isin(pairs[:, 0], _rows_of_file(Path(options.anchors_file), source))]
    if options.anchors is not None and options.anchors < len(pairs):
        generator = np.random.default_rng(options.seed)
        pairs = pairs[np.sort(generator.choice(len(pairs), options.anchors, replace=False))]
    needed = max(source_embedding.shape[1], target_embedding.shape[1])
    if len(pairs) < needed:
        raise DttError(
            f"{len(pairs)} anchors can't determine a map of {needed} dimensions ({n_shared} tokens are shared); "
            f"at least {needed} are needed."
        )
    held_out = _hold_out(len(pairs), needed, options)
    return Anchors(pairs[:, 0], pairs[:, 1], held_out, n_shared, share, left_out)


def _by_token(source: Vocabulary, target: Vocabulary, n_source_rows: int, n_target_rows: int) -> tuple[Rows, float]:
    """Return the pairs (n, 2) of rows with the same bytes or the same special token, and their share."""
    both = [(row, target.token_bytes[t]) for t, row in source.token_bytes.items() if t in target.token_bytes]
    both += [(row, target.special[t]) for t, row in source.special.items() if t in target.special]
    pairs = np.array(both, np.int64).reshape(-1, 2)
    pairs = pairs[(pairs[:, 0] < n_source_rows) & (pairs[:, 1] < n_target_rows)]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    smaller = min(len(v.token_bytes) + len(v.special) for v in (source, target))
    return pairs, len(pairs) / max(smaller, 1)


def _by_row_number(source: TensorLocation, target: TensorLocation) -> Rows:
    if source.shape[0] != target.shape[0]:
        raise DttError(
            f"Matching by row number needs as many rows in both embeddings, and there are {source.shape[0]} "
            f"in {source.file} and {target.shape[0]} in {target.file}; match by token instead (--match tokens)."
        )
    rows = np.arange(source.shape[0])
    return np.stack([rows, rows], axis=1)


def read_anchors_file(path: Path) -> bytes:
    """Return what stands in an anchors file.

    Raises:
        DttError: it can't be read, or is no regular file.
    """
    try:
        return read_bytes(path)
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}.") from error


def _rows_of_file(path: Path, source: Vocabulary) -> Rows:
    """Return the source's rows of the tokens that an anchors file lists."""
    content = read_anchors_file(path)
    try:
        is_json = content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        tokens = parse_json(content) if is_json else content.decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise DttError(f"{path} is neither one token per line nor a JSON list of tokens, in UTF-8.") from error
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise DttError(f"{path} should list tokens: one per line, or a JSON list of strings.")
    rows = [source.special.get(token, source.token_bytes.get(token.encode())) for token in tokens]
    unknown = [token for token, row in zip(tokens, rows, strict=True) if row is None]
    if unknown:
        raise DttError(
            f"{path} lists {len(unknown)} tokens that the source's vocabulary doesn't have, "
            f"the first is {unknown[0]!r}; write tokens as text, with a space where they begin with one."
        )
    return np.array(rows, np.int64)


def _hold_out(n: int, needed: int, options: AlignmentOptions) -> Bool[NDArray[np.bool_], " n"]:
    """Draw the held-out share; what is left must still determine the map."""
    count = min(round(options.holdout * n), options.holdout_most, n - needed)
    held_out = np.zeros(n, bool)
    if count >= options.holdout_fewest:
        # A seed of its own: the same numbers as for sampling would hold out the sample's beginning.
        generator = np.random.default_rng([options.seed, 1])
        held_out[generator.choice(n, count, replace=False)] = True
    return held_out
