"""Linear maps without the orthogonality constraint, in closed form from M = X^T Y and the Gram matrices.

    ridge     W = (Cxx + l I)^-1 M                                   Cxx = X^T X (d_s, d_s)
    relative  W = M (Cyy + l I)^-1                                   Cyy = Y^T Y (d_t, d_t)
    whitened  W = Cxx^-1/2 polar(Cxx^-1/2 M Cyy^-1/2) Cyy^1/2

The first predicts targets by regression; the second is the reverse regression, which is what makes a token's inner
products with the anchors the same on both sides; the third rotates in coordinates in which both spaces are white.
l is chosen among multiples of the mean eigenvalue, by the error on held-out anchors. docs/alignment.md derives them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Engine, Matrix
from dtt_plugin.alignment.heldout import HeldOut, held_out_figures
from dtt_plugin.alignment.moments import Moments
from dtt_plugin.alignment.polar import RANK_TOLERANCE, orthogonality_error, polar_factor
from dtt_plugin.alignment.report import MapFigures
from dtt_plugin.arrays import Float64
from dtt_plugin.errors import DttError

LinearMethod = Literal["ridge", "relative", "whitened"]
STRENGTHS = tuple(float(strength) for strength in np.logspace(-6, 1, 15))
"""What l may be, in mean eigenvalues of the Gram matrix."""


class LinearFit(NamedTuple):
    """A map and what is known about it."""

    W: Float64[Matrix, "d_s d_t"]
    """(d_s, d_t)"""
    figures: MapFigures
    """Their `penalty` is l."""
    held_out: HeldOut | None


class _Factors(NamedTuple):
    """A family of maps: W(l) = left diag(1 / (values + l)) right."""

    left: Float64[Matrix, "d_s r"]
    """(d_s, r)"""
    values: Float64[Matrix, " r"]
    """(r,): eigenvalues of what is inverted, ascending."""
    right: Float64[Matrix, "r d_t"]
    """(r, d_t)"""

    def at(
        self, ridge: float, engine: Engine, rows: Float64[Matrix, "n d_s"] | None = None
    ) -> Float64[Matrix, "n_or_d_s d_t"]:
        """Return W(l), or what it makes of `rows` (n, d_s)."""
        left = self.left if rows is None else engine.matmul(rows, self.left)
        return engine.matmul(left / (self.values + ridge), self.right)


def fit_linear(method: LinearMethod, moments: Moments, engine: Engine, *, seed: int) -> LinearFit:
    """Fit a map to all anchors; where it has a penalty, choose it on the held-out ones.

    Args:
        method: which map.
        moments: with the Gram matrices that the method needs.
        engine: what computes.
        seed: of the held-out figures' random rotation.

    Raises:
        DttError: a penalty has to be chosen and no anchor is held out, or a space that can't be whitened.
    """
    x, y = (np.asarray(rows, np.float64) for rows in (moments.held_source, moments.held_target))
    if method != "whitened" and not len(x):
        raise DttError(
            f"The method {method} chooses its penalty on held-out anchors, and none are held out; use more anchors and "
            "a positive --holdout."
        )
    strength = 0.0
    predicted: Matrix | None = None
    if len(x):
        without = _Sums.of(moments).minus(x, y, engine)
        kept = _factors(method, without, engine)
        if method == "whitened":
            predicted = kept.at(0.0, engine, x)
        else:
            strength, predicted = _best_strength(kept, x, y, engine)
    factors = _factors(method, _Sums.of(moments), engine)
    ridge = strength * float(factors.values.mean())
    W = factors.at(ridge, engine)
    held = None
    if predicted is not None:
        x32, predicted32, y32 = (np.asarray(rows, np.float32) for rows in (x, predicted, y))
        held = held_out_figures("exact", x32, predicted32, y32, seed=seed)
    return LinearFit(W, _figures(method, moments, W, factors.values, ridge, engine), held)


class _Sums(NamedTuple):
    M: Float64[Matrix, "d_s d_t"]
    source_gram: Float64[Matrix, "d_s d_s"] | None
    target_gram: Float64[Matrix, "d_t d_t"] | None

    @classmethod
    def of(cls, moments: Moments) -> _Sums:
        return cls(moments.M, moments.source_gram, moments.target_gram)

    def minus(self, x: Float64[Matrix, "n d_s"], y: Float64[Matrix, "n d_t"], engine: Engine) -> _Sums:
        """Return the sums without the rows x (n, d_s) and y (n, d_t)."""
        return _Sums(
            self.M - engine.matmul(x.T, y),
            None if self.source_gram is None else self.source_gram - engine.gram(x),
            None if self.target_gram is None else self.target_gram - engine.gram(y),
        )


def _factors(method: LinearMethod, sums: _Sums, engine: Engine) -> _Factors:
    if method == "ridge":
        values, V = _eigh(sums.source_gram, engine)
        return _Factors(V, values, engine.matmul(V.T, sums.M))
    if method == "relative":
        values, V = _eigh(sums.target_gram, engine)
        return _Factors(engine.matmul(sums.M, V), values, V.T)
    (source_values, U), (target_values, V) = (_eigh(gram, engine) for gram in sums[1:])
    for side, values in (("source", source_values), ("target", target_values)):
        rank = _rank(values)
        if rank < len(values):
            raise DttError(
                f"The anchors span {rank} of the {side}'s {len(values)} dimensions, so that space can't be whitened; "
                "use --method ridge."
            )
    # In the eigenvectors of both Gram matrices: W = U diag(1/u) polar(N) diag(v) V^T, N = diag(1/u) U^T M V diag(1/v).
    u, v = np.sqrt(source_values), np.sqrt(target_values)
    N = engine.matmul(engine.matmul(U.T, sums.M), V) / u[:, None] / v
    turned = polar_factor(N, engine).W * v
    # W = U diag(u) diag(1/u^2) (turned V^T) has the form of the others, with nothing to add to the eigenvalues.
    return _Factors(U * u, source_values, engine.matmul(turned, V.T))


def _eigh(gram: Float64[Matrix, "d d"] | None, engine: Engine) -> tuple[Float64[Matrix, " d"], Float64[Matrix, "d d"]]:
    """Return eigenvalues (d,), ascending and not negative, and eigenvectors (d, d) in columns."""
    assert gram is not None, "measured for every method that needs it"
    values, vectors = engine.eigh((gram + gram.T) / 2)  # sums of float32 products are symmetric up to rounding
    return np.maximum(values, 0), vectors


def _rank(values: Float64[Matrix, " d"]) -> int:
    return int(np.count_nonzero(values > RANK_TOLERANCE * values[-1]))


def _best_strength(
    kept: _Factors, x: Float64[Matrix, "n d_s"], y: Float64[Matrix, "n d_t"], engine: Engine
) -> tuple[float, Float64[Matrix, "n d_t"]]:
    """Return the strength whose map without the held-out rows predicts them best, and its prediction."""
    mean = float(kept.values.mean())
    best: tuple[float, float, NDArray[np.float64]] | None = None
    rows = engine.matmul(x, kept.left)
    for strength in STRENGTHS:
        predicted = engine.matmul(rows / (kept.values + strength * mean), kept.right)
        error = float(np.linalg.norm(predicted - y))
        if best is None or error < best[0]:
            best = error, strength, predicted
    assert best is not None
    return best[1], best[2]


def _figures(
    method: LinearMethod,
    moments: Moments,
    W: Float64[Matrix, "d_s d_t"],
    values: Float64[Matrix, " r"],
    ridge: float,
    engine: Engine,
) -> MapFigures:
    """Return what follows from the sums alone; ||X W||^2 = tr(W^T Cxx W), since W keeps no lengths."""
    assert moments.source_gram is not None
    overlap = float(np.vdot(W, moments.M))
    mapped_square = float(np.vdot(W, engine.matmul(moments.source_gram, W)))
    residual = np.sqrt(max(mapped_square + moments.target_square - 2 * overlap, 0.0))
    square = W.shape[0] == W.shape[1]
    smallest = float(values[0] + ridge)
    return MapFigures(
        residual=float(residual),
        relative_residual=float(residual / np.sqrt(moments.target_square)),
        orthogonality_error=orthogonality_error(W, engine),
        distance_from_identity=float(np.linalg.norm(W - np.eye(len(W))) / np.sqrt(2 * len(W))) if square else None,
        rank=_rank(values),
        condition=float(values[-1] + ridge) / smallest if smallest > 0 else None,
        gap=float(values[len(values) - _rank(values)] / values[-1]),
        unique=ridge > 0 or _rank(values) == len(values),
        dimensions=len(values),
        penalty=None if method == "whitened" else ridge,
        scale=overlap / mapped_square if mapped_square > 0 else 0.0,
    )
