"""Pass over two embeddings once, block by block, and keep only sums: M = X^T Y and what goes with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.anchors import Anchors, Rows
from dtt_plugin.alignment.engine import Cross, Engine, Matrix
from dtt_plugin.alignment.options import AlignmentOptions
from dtt_plugin.arrays import Float, Float64
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.checkpoint.vocabulary import Vocabulary
from dtt_plugin.errors import DttError
from dtt_plugin.progress import Bar

# Numbers per block and matrix: large enough for full speed, small beside M.
_BLOCK = 2**24
_FEWEST_ROWS = 256
# Rows whose squares are summed at once.
_FEW_ROWS = 64
_Item = TypeVar("_Item")


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

    M: Float64[Matrix, "d_s d_t"]
    """(d_s, d_t): sum of x^T y."""
    source_square: float
    """Sum of ||x||^2."""
    target_square: float
    """Sum of ||y||^2."""
    source_mean: Float64[Matrix, " d_s"] | None
    """(d_s,): what was subtracted, with `center`."""
    target_mean: Float64[Matrix, " d_t"] | None
    held_source: Float[NDArray[Any], "n d_s"]
    """(n_held, d_s): the held-out rows."""
    held_target: Float[NDArray[Any], "n d_t"]
    """(n_held, d_t)"""
    source_gram: Float64[Matrix, "d_s d_s"] | None = None
    """(d_s, d_s): sum of x^T x, where the method needs it."""
    target_gram: Float64[Matrix, "d_t d_t"] | None = None
    """(d_t, d_t): sum of y^T y, likewise."""


@dataclass
class _Sums:
    cross: Cross
    source_gram: Cross | None = None
    target_gram: Cross | None = None
    source_square: float = 0.0
    target_square: float = 0.0
    source_sum: Any = 0.0
    target_sum: Any = 0.0
    held_source: list[NDArray[Any]] = field(default_factory=list)
    held_target: list[NDArray[Any]] = field(default_factory=list)

    def finish(self) -> None:
        """Return when every block that was added is in the sums."""
        for cross in (self.cross, self.source_gram, self.target_gram):
            if cross is not None:
                cross.finish()


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
        options: weighting, centring, and the method, which decides which sums are made.
        engine: what computes.
        progress: show a bar on stderr if it takes more than two seconds.

    Raises:
        DttError: NaN or infinity (with token and row), or an embedding of zeros.
    """
    widths = [side.embedding.shape[1] for side, _ in targets]
    d_s = source.embedding.shape[1]
    with_source, with_target = options.method != "procrustes", options.method in ("relative", "whitened")
    sums = [
        _Sums(
            engine.cross(d_s, width),
            engine.cross(d_s, d_s) if with_source else None,
            engine.cross(width, width) if with_target else None,
        )
        for width in widths
    ]
    union = np.unique(np.concatenate([anchors.source_rows for _, anchors in targets]))
    block = max(_FEWEST_ROWS, _BLOCK // max(d_s, *widths))
    n_rows = sum(len(anchors.source_rows) for _, anchors in targets)
    before: _Sums | None = None
    with Bar(total=n_rows, unit="row", desc="aligning", leave=False, disable=not progress) as bar:
        for index, x, y in _one_ahead(_blocks(source, targets, union, block, options, engine)):
            total = sums[index]
            total.cross.add(x.values, y.values, bfloat16=x.bfloat16 and y.bfloat16)
            if total.source_gram:
                total.source_gram.add(x.values, x.values, bfloat16=x.bfloat16)
            if total.target_gram:
                total.target_gram.add(y.values, y.values, bfloat16=y.bfloat16)
            total.source_square += float(x.squares.sum())
            total.target_square += float(y.squares.sum())
            if options.center:
                total.source_sum = total.source_sum + x.values.sum(axis=0, dtype=np.float64)
                total.target_sum = total.target_sum + y.values.sum(axis=0, dtype=np.float64)
            total.held_source.append(x.values[x.held_out])
            total.held_target.append(y.values[x.held_out])
            bar.update(len(x.values))
            # Now every earlier block is done with, and its memory may be taken for the next but one.
            if before is not None and before is not total:
                before.finish()
            before = total
    return [
        _finished(total, len(anchors.source_rows), source, side, options)
        for total, (side, anchors) in zip(sums, targets, strict=True)
    ]


@dataclass(frozen=True)
class _Block:
    """Rows of one side as they enter the sums."""

    values: NDArray[Any]
    """(b, d), in the engine's work type."""
    squares: Matrix
    """(b,): squared lengths."""
    bfloat16: bool
    """Whether all values are bfloat16 numbers."""
    held_out: NDArray[np.bool_]
    """(b,)"""


def _blocks(
    source: Side,
    targets: Sequence[tuple[Side, Anchors]],
    union: Rows,
    block: int,
    options: AlignmentOptions,
    engine: Engine,
) -> Iterator[tuple[int, _Block, _Block]]:
    """Yield, block of source rows by block, every target's number with the rows of both sides that it shares."""
    widths = [side.embedding.shape[1] for side in (source, *(side for side, _ in targets))]
    most = min(block, len(union)) * max(widths)
    # One block of each side is multiplied, one waits, and one is being made.
    converted, stored = [_Ring(3, most, engine.work_dtype) for _ in "xy"], [_Ring(1, most, "V8") for _ in "xy"]
    # Nothing is multiplied before the first block is there, so that one is short.
    for rows in np.split(union, range(max(block // 4, 1), len(union), block)):
        x_raw = _read(source, rows, stored[0])
        for index, (side, anchors) in enumerate(targets):
            first, last = np.searchsorted(anchors.source_rows, [rows[0], rows[-1] + 1])
            x_rows, y_rows = anchors.source_rows[first:last], anchors.target_rows[first:last]
            if not len(x_rows):
                continue
            x_part = x_raw if len(x_rows) == len(rows) else x_raw[np.searchsorted(rows, x_rows)]
            y_raw, held = _read(side, y_rows, stored[1]), anchors.held_out[first:last]
            x, y = (
                _prepared(engine.float_block(raw, ring.take(raw.shape)), raw, at, of, held, options)
                for raw, at, of, ring in ((x_part, x_rows, source, converted[0]), (y_raw, y_rows, side, converted[1]))
            )
            yield index, x, y


class _Ring:
    """As many arrays as are in use at a time, handed out in turn.

    Memory that the system gives anew is cleared first, which takes longer than converting a block into it.
    """

    def __init__(self, n: int, size: int, dtype: Any) -> None:
        self._arrays = cycle([np.empty(size, dtype) for _ in range(n)])

    def take(self, shape: tuple[int, ...], dtype: Any = None) -> NDArray[Any]:
        """Return an array of this shape, filled with anything; a new one where it does not fit."""
        memory = next(self._arrays)
        found = memory if dtype is None else memory.view(dtype)
        n = math.prod(shape)
        return found[:n].reshape(shape) if n <= len(found) else np.empty(shape, found.dtype)


def _read(side: Side, rows: Rows, ring: _Ring) -> NDArray[Any]:
    embedding = side.embedding
    return embedding.read_rows_at(rows, ring.take((len(rows), *embedding.shape[1:]), embedding.numpy_dtype))


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield `items`, making the next one in another thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="dtt-read") as reader:
        ahead = reader.submit(next, items, None)
        while (current := ahead.result()) is not None:
            ahead = reader.submit(next, items, None)
            yield current


def _prepared(
    values: NDArray[Any],
    raw: NDArray[Any],
    rows: Rows,
    side: Side,
    held_out: NDArray[np.bool_],
    options: AlignmentOptions,
) -> _Block:
    """Check a block, which was converted from `raw`, and weight it."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = _squares(values)
    if not np.isfinite(squares).all():
        _reject(raw, rows, side, squares)
    if options.weight == "norm":
        lengths = np.sqrt(np.where(squares > 0, squares, 1))
        values = values / lengths.astype(values.dtype)[:, None]
        squares = (squares > 0).astype(np.float64)
    return _Block(values, squares, raw.dtype.name == "bfloat16" and options.weight == "none", held_out)


def _squares(values: NDArray[Any]) -> Matrix:
    """Return the squared lengths of rows, (b,).

    Float32 sums of squares come out too small by 1e-6, which the residual, a difference, would show. So they are
    summed in float64, from a few rows that are converted in the processor's cache.
    """
    squares = np.empty(len(values))
    few = np.empty((_FEW_ROWS, values.shape[1]))
    for start in range(0, len(values), _FEW_ROWS):
        part = values[start : start + _FEW_ROWS]
        rows = few[: len(part)]
        rows[:] = part
        squares[start : start + _FEW_ROWS] = np.vecdot(rows, rows)
    return squares


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
    source_gram = total.source_gram.total() if total.source_gram else None
    target_gram = total.target_gram.total() if total.target_gram else None
    held_source, held_target = np.concatenate(total.held_source), np.concatenate(total.held_target)
    source_mean = target_mean = None
    source_square, target_square = total.source_square, total.target_square
    if options.center:
        source_mean, target_mean = total.source_sum / n, total.target_sum / n
        M -= n * np.outer(source_mean, target_mean)
        for gram, mean in ((source_gram, source_mean), (target_gram, target_mean)):
            if gram is not None:
                gram -= n * np.outer(mean, mean)
        source_square -= n * float(source_mean @ source_mean)
        target_square -= n * float(target_mean @ target_mean)
        held_source = held_source - source_mean.astype(held_source.dtype)
        held_target = held_target - target_mean.astype(held_target.dtype)
    return Moments(
        M,
        source_square,
        target_square,
        source_mean,
        target_mean,
        held_source,
        held_target,
        source_gram,
        target_gram,
    )
