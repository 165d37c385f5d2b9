"""Go or no-go: how well the map serves tokens that it was not fitted to, against a random rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Engine, Matrix
from dtt_plugin.alignment.polar import Polar, polar_factor
from dtt_plugin.alignment.rotations import mixing_rotation
from dtt_plugin.arrays import Float, Float32, Float64

# Up to this width a second exact fit costs under a second.
_EXACT_UP_TO = 1024
# Largest root mean square rotation (radians) per dimension for which one step is taken as the answer.
_LARGEST_FIRST_ORDER = 0.1
CSLS_NEIGHBOURS = 10


@dataclass(frozen=True)
class Retrieval:
    """How predictions meet their targets; precision among the held-out tokens only."""

    cosine: float
    """Mean over tokens of cos(prediction, target)."""
    relative_error: float
    """||predictions - targets||_F / ||targets||_F"""
    precision_at_1: float
    """Share of predictions whose nearest target (by cosine) is their own."""
    precision_at_1_back: float
    """Share of targets whose nearest prediction is their own."""
    csls_precision_at_1: float
    """The same with CSLS, which discounts targets that are near everything (Lample et al. 2018)."""
    csls_precision_at_1_back: float


@dataclass(frozen=True)
class HeldOut:
    """The held-out figures of an alignment."""

    n: int
    fit: Literal["exact", "first-order"]
    """How the map without the held-out tokens was obtained."""
    aligned: Retrieval
    random_rotation: Retrieval
    norm_retained: tuple[float, float, float]
    """Smallest, mean and largest ||x W|| / ||x||; 1 except where the width shrinks."""


def hold_out(
    M: Float64[Matrix, "d_s d_t"],
    polar: Polar,
    x: Float[NDArray[Any], "n d_s"],
    y: Float[NDArray[Any], "n d_t"],
    engine: Engine,
    *,
    seed: int,
) -> HeldOut:
    """Measure the map fitted to all anchors but the held-out ones on the held-out ones.

    Args:
        M: (d_s, d_t), over all anchors.
        polar: of M.
        x: (n, d_s), the held-out source rows, which M contains.
        y: (n, d_t), their targets.
        engine: what computes.
        seed: of the random rotation.
    """
    # Cosines and neighbours don't need more than float32.
    x32, y32 = np.asarray(x, np.float32), np.asarray(y, np.float32)
    predicted = targets = None
    fit: Literal["exact", "first-order"] = "first-order"
    if polar.vectors is not None and M.shape[0] == M.shape[1] > _EXACT_UP_TO:
        predicted, targets = _first_order(polar, polar.vectors, x32, y32, engine)
    if predicted is None or targets is None:
        fit = "exact"
        left = M - engine.matmul(np.asarray(x, np.float64).T, np.asarray(y, np.float64))
        predicted, targets = engine.matmul(x32, polar_factor(left, engine).W.astype(np.float32)), y32
    return held_out_figures(fit, x32, predicted, targets, seed=seed)


def held_out_figures(
    fit: Literal["exact", "first-order"],
    x: Float32[NDArray[np.float32], "n d_s"],
    predicted: Float32[NDArray[np.float32], "n d_t"],
    targets: Float32[NDArray[np.float32], "n d_t"],
    *,
    seed: int,
) -> HeldOut:
    """Compare what a map without the held-out tokens makes of them with their targets.

    Args:
        fit: how that map was obtained.
        x: (n, d_s), the held-out source rows.
        predicted: (n, d_t).
        targets: (n, d_t).
        seed: of the random rotation.
    """
    lengths = np.linalg.norm(x, axis=1)
    retained = np.linalg.norm(predicted, axis=1)[lengths > 0] / lengths[lengths > 0]
    # Turning the predictions once more turns the map: the null needs no map of its own.
    null = mixing_rotation(predicted, np.random.default_rng([seed, 2]))
    return HeldOut(
        n=len(x),
        fit=fit,
        aligned=retrieval(predicted, targets),
        random_rotation=retrieval(null, targets),
        norm_retained=(float(retained.min()), float(retained.mean()), float(retained.max())),
    )


def _first_order(
    polar: Polar,
    V: Float32[NDArray[np.float32], "d d"],
    x: Float32[NDArray[np.float32], "n d"],
    y: Float32[NDArray[np.float32], "n d"],
    engine: Engine,
) -> tuple[Float32[NDArray[np.float32], "n d"] | None, Float32[NDArray[np.float32], "n d"] | None]:
    """Take the held-out rows' share E = x^T y out of the polar factor of M, to first order.

    With N = W^T (M - E) = H - W^T E = Q P, the factor sought is W Q. Q is near I: Q = I + K + ..., K skew
    with K P + P K = N - N^T, which in the eigenvectors of H is solved by elementwise division. The Cayley
    transform makes I + K orthogonal again. Everything is returned in those eigenvectors' coordinates, which
    changes no length and no angle.

    Returns:
        Predictions and targets, both (n, d); None, None where K is too large for one step.
    """
    a = engine.matmul(engine.matmul(x, polar.W.astype(np.float32)), V)  # (n, d)
    b = engine.matmul(y, V)  # (n, d)
    K = engine.matmul(a.T, b)  # V^T W^T E V: (d, d)
    p = polar.singular_values.astype(np.float32) - np.diagonal(K)
    if p.min() <= 0:
        return None, None
    K = K.T - K
    for row, sum_with_row in zip(K, p, strict=True):
        row /= sum_with_row + p
    if np.linalg.norm(K) > _LARGEST_FIRST_ORDER * np.sqrt(len(K)):
        return None, None
    # a (I + K/2) (I - K/2)^-1, and I - K/2 is the transpose of I + K/2.
    K *= 0.5
    K.flat[:: len(K) + 1] += 1
    turned = engine.matmul(a, K)
    return engine.divide(turned, K.T), b


def retrieval(
    predicted: Float32[NDArray[np.float32], "n d"], targets: Float32[NDArray[np.float32], "n d"]
) -> Retrieval:
    """Compare predictions with targets, (n, d) each, row by row and among each other."""
    similarity = _unit(predicted) @ _unit(targets).T  # (n, n)
    error = np.linalg.norm(predicted - targets) / max(np.linalg.norm(targets), np.finfo(np.float32).tiny)
    k = min(CSLS_NEIGHBOURS, len(similarity))
    near_targets = np.partition(similarity, -k, axis=1)[:, -k:].mean(axis=1)  # (n,) per prediction
    near_predictions = np.partition(similarity, -k, axis=0)[-k:].mean(axis=0)  # (n,) per target
    own = np.arange(len(similarity))

    def hits(scores: Float[NDArray[Any], "n n"], axis: int) -> float:
        return float(np.mean(scores.argmax(axis=axis) == own))

    return Retrieval(
        cosine=float(np.diagonal(similarity).mean(dtype=np.float64)),
        relative_error=float(error),
        precision_at_1=hits(similarity, 1),
        precision_at_1_back=hits(similarity, 0),
        csls_precision_at_1=hits(2 * similarity - near_predictions, 1),
        csls_precision_at_1_back=hits(2 * similarity - near_targets[:, None], 0),
    )


def _unit(rows: Float32[NDArray[np.float32], "n d"]) -> Float32[NDArray[np.float32], "n d"]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.where(lengths > 0, lengths, 1)
    return unit
