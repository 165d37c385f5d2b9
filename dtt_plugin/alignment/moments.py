"""Pass over two embeddings once, block by block, and keep only sums: M = X^T Y and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from dtt_plugin.alignment.anchors import Anchors, Rows
from dtt_plugin.alignment.engine import Cross, Engine, Matrix
from dtt_plugin.alignment.options import AlignmentOptions
from dtt_plugin.errors import DttError
from dtt_plugin.tensor_files import TensorLocation
from dtt_plugin.vocabulary import Vocabulary

# Numbers per block and matrix: large enough for full speed, small beside M.
_BLOCK = 2**24
_FEWEST_ROWS = 256


@dataclass(frozen=True)
class Side:
    """One of the two embeddings, with names for its rows in messages."""

    model: str
    embedding: TensorLocation
    vocabulary: Vocabulary | None

    def where(self, row: int) -> str:
        """Say which row of which file, and which token it is."""
        token = f"token {self.vocabulary.name_of(row)}, " if self.vocabulary else ""
        return f"{token}row {row} of {self.embedding.name} in {self.embedding.file}"


@dataclass
class Moments:
    """Sums over the anchors; x and y are the rows as they entered: weighted and centred by the options."""

    M: Matrix
    """(d_s, d_t): sum of x^T y."""
    source_square: float
    """Sum of ||x||^2."""
    target_square: float
    """Sum of ||y||^2."""
    source_mean: Matrix | None
    """(d_s,): what was subtracted, with `center`."""
    target_mean: Matrix | None
    held_source: NDArray[Any]
    """(n_held, d_s): the held-out rows."""
    held_target: NDArray[Any]
    """(n_held, d_t)"""


@dataclass
class _Sums:
    cross: Cross
    source_square: float = 0.0
    target_square: float = 0.0
    source_sum: Any = 0.0
    target_sum: Any = 0.0
    held_source: list[NDArray[Any]] = field(default_factory=list)
    held_target: list[NDArray[Any]] = field(default_factory=list)


def measure(
    source: Side,
    targets: Sequence[tuple[Side, Anchors]],
    options: AlignmentOptions,
    engine: Engine,
    *,
    progress: bool = False,
) -> list[Moments]:
    """Read the source once and each target along with it.

    Args:
        source: its embedding, [rows, d_s].
        targets: each with its anchors.
        options: weighting and centring.
        engine: what computes.
        progress: show a bar on stderr if it takes more than two seconds.

    Raises:
        DttError: NaN or infinity (with token and row), or an embedding of zeros.
    """
    widths = [side.embedding.shape[1] for side, _ in targets]
    d_s = source.embedding.shape[1]
    sums = [_Sums(engine.cross(d_s, width)) for width in widths]
    union = np.unique(np.concatenate([anchors.source_rows for _, anchors in targets]))
    block = max(_FEWEST_ROWS, _BLOCK // max(d_s, *widths))
    with tqdm(total=len(union), unit="row", desc="aligning", delay=2, disable=not progress) as bar:
        for rows, x_raw, parts in _blocks(source, targets, union, block):
            for total, (side, _), (x_rows, part, y_raw, y_rows, held) in zip(sums, targets, parts, strict=True):
                if not len(x_rows):
                    continue
                x_part = x_raw if len(part) == len(x_raw) else x_raw[part]
                x, x_squares = _prepared(x_part, x_rows, source, options, engine)
                y, y_squares = _prepared(y_raw, y_rows, side, options, engine)
                exact = options.weight == "none" and x_raw.dtype == y_raw.dtype and x_raw.dtype.name == "bfloat16"
                total.cross.add(x, y, bfloat16=exact)
                total.source_square += float(x_squares.sum())
                total.target_square += float(y_squares.sum())
                if options.center:
                    total.source_sum = total.source_sum + x.sum(axis=0, dtype=np.float64)
                    total.target_sum = total.target_sum + y.sum(axis=0, dtype=np.float64)
                total.held_source.append(x[held])
                total.held_target.append(y[held])
            bar.update(len(rows))
    return [
        _finished(total, len(anchors.source_rows), source, side, options)
        for total, (side, anchors) in zip(sums, targets, strict=True)
    ]


_Part = tuple[Rows, Rows, NDArray[Any], Rows, NDArray[np.bool_]]


def _blocks(
    source: Side, targets: Sequence[tuple[Side, Anchors]], union: Rows, block: int
) -> Iterator[tuple[Rows, NDArray[Any], list[_Part]]]:
    """Yield blocks of source rows with every target's part of them, reading one block ahead."""

    def read(start: int) -> tuple[Rows, NDArray[Any], list[_Part]]:
        rows = union[start : start + block]
        parts = []
        for side, anchors in targets:
            first, last = np.searchsorted(anchors.source_rows, [rows[0], rows[-1] + 1])
            x_rows, y_rows = anchors.source_rows[first:last], anchors.target_rows[first:last]
            y_raw = side.embedding.read_rows_at(y_rows)
            parts.append((x_rows, np.searchsorted(rows, x_rows), y_raw, y_rows, anchors.held_out[first:last]))
        return rows, source.embedding.read_rows_at(rows), parts

    with ThreadPoolExecutor(1, thread_name_prefix="dtt-read") as reader:
        starts = range(0, len(union), block)
        ahead = reader.submit(read, 0)
        for start in starts:
            current = ahead.result()
            if start + block < len(union):
                ahead = reader.submit(read, start + block)
            yield current


def _prepared(
    raw: NDArray[Any], rows: Rows, side: Side, options: AlignmentOptions, engine: Engine
) -> tuple[NDArray[Any], Matrix]:
    """Convert a block to the work type, check it, weight it; return it with its rows' squared lengths."""
    values = engine.float_block(raw)
    with np.errstate(over="ignore", invalid="ignore"):
        # Float32 sums of squares come out too small by 1e-6, which the residual, a difference, would show.
        squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)  # (b,)
    if not np.isfinite(squares).all():
        _reject(raw, rows, side, squares)
    if options.weight == "norm":
        lengths = np.sqrt(np.where(squares > 0, squares, 1))
        values = values / lengths.astype(values.dtype)[:, None]
        squares = (squares > 0).astype(np.float64)
    return values, squares


def _reject(raw: NDArray[Any], rows: Rows, side: Side, squares: NDArray[Any]) -> None:
    index = int(np.flatnonzero(~np.isfinite(squares))[0])
    row = np.asarray(raw[index], np.float64)
    what = "holds NaN" if np.isnan(row).any() else "holds infinity"
    if np.isfinite(row).all():
        what = "holds a number too large to be squared"
    raise DttError(f"The embedding of {side.model} {what}: {side.where(int(rows[index]))}; check the checkpoint.")


def _finished(total: _Sums, n: int, source: Side, target: Side, options: AlignmentOptions) -> Moments:
    """Apply the centring to the sums: sum (x - a)(y - b) = sum xy - n ab for the means a and b."""
    for side, square in ((source, total.source_square), (target, total.target_square)):
        if square == 0:
            raise DttError(f"The embedding of {side.model} is all zeros ({side.embedding.file}); check it.")
    M = total.cross.total()
    held_source, held_target = np.concatenate(total.held_source), np.concatenate(total.held_target)
    source_mean = target_mean = None
    source_square, target_square = total.source_square, total.target_square
    if options.center:
        source_mean, target_mean = total.source_sum / n, total.target_sum / n
        M -= n * np.outer(source_mean, target_mean)
        source_square -= n * float(source_mean @ source_mean)
        target_square -= n * float(target_mean @ target_mean)
        held_source = held_source - source_mean.astype(held_source.dtype)
        held_target = held_target - target_mean.astype(held_target.dtype)
    return Moments(M, source_square, target_square, source_mean, target_mean, held_source, held_target)
