"""The orthogonal polar factor of a cross-covariance, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Engine, Matrix, NumpyEngine
from dtt_plugin.arrays import Float32, Float64
from dtt_plugin.errors import DttError

# Through the eigenvalues of M^T M an error of eps cond(M)^2 enters W: at most about 2e-6 up to here.
# Worse conditioned matrices take the singular value decomposition, which costs about three times as much.
WORST_CONDITION_FOR_EIGH = 1e5
# What float32 products leave undetermined, relative to the largest singular value.
RANK_TOLERANCE = 2.0**-24
_ORTHOGONAL_ENOUGH = 2e-13


@dataclass(frozen=True)
class Polar:
    """W of M = W H, with what is known about M."""

    W: Float64[Matrix, "d_s d_t"]
    """(d_s, d_t): orthonormal columns, or orthonormal rows where d_s < d_t."""
    singular_values: Float64[Matrix, " r"]
    """(min(d_s, d_t),), descending."""
    vectors: Float32[NDArray[np.float32], "d_t d_t"] | None
    """(d, d): eigenvectors of H in columns, in the order of `singular_values`; None where not computed."""
    rank: int
    """Of M, with `RANK_TOLERANCE`."""
    orthogonality_error: float
    """||W^T W - I||_F (W W^T where d_s < d_t)."""

    @property
    def unique(self) -> bool:
        """Whether M determines W: where its rank is not full, the rest of W is arbitrary."""
        return self.rank == len(self.singular_values)

    @property
    def condition(self) -> float:
        """Largest over smallest singular value."""
        smallest = float(self.singular_values[-1])
        return float(self.singular_values[0]) / smallest if smallest > 0 else float("inf")

    @property
    def gap(self) -> float:
        """The smallest singular value that counts, relative to the largest."""
        return float(self.singular_values[self.rank - 1] / self.singular_values[0])


def polar_factor(M: Float64[Matrix, "d_s d_t"], engine: Engine | None = None) -> Polar:
    """Return the (semi-)orthogonal W that maximises tr(W^T M).

    Args:
        M: (d_s, d_t), finite.
        engine: what computes; numpy where none is given.

    Raises:
        DttError: M is zero.
    """
    engine = engine or NumpyEngine(np.float64)
    if M.shape[0] < M.shape[1]:
        turned = polar_factor(np.ascontiguousarray(M.T), engine)
        W = np.ascontiguousarray(turned.W.T)
        return Polar(W, turned.singular_values, None, turned.rank, turned.orthogonality_error)
    norm = float(np.linalg.norm(M))
    if norm == 0:
        raise DttError("The cross-covariance of the two embeddings is zero, so nothing determines a map.")
    eigenvalues, V = engine.eigh(engine.gram(M))
    sigma = np.sqrt(np.maximum(eigenvalues, 0))  # (d_t,), ascending like the columns of V
    vectors: NDArray[np.float32] | None = None
    if sigma[0] * WORST_CONDITION_FOR_EIGH > sigma[-1]:
        vectors = V[:, ::-1].astype(np.float32)
        V /= np.sqrt(sigma)
        W = engine.matmul(M, engine.gram(V.T))  # M V diag(1/sigma) V^T: (d_s, d_t)
        del V
        sigma = sigma[::-1]
    else:
        del V
        u, sigma, vt = engine.svd(M)
        W = engine.matmul(u, vt)
        del u, vt
    error = _orthogonalise(W, engine)
    rank = int(np.count_nonzero(sigma > RANK_TOLERANCE * sigma[0]))
    return Polar(W, sigma, vectors, rank, error)


def orthogonality_error(W: Float64[Matrix, "d_s d_t"], engine: Engine | None = None) -> float:
    """Return ||W^T W - I||_F, or ||W W^T - I||_F where W (d_s, d_t) has fewer rows than columns."""
    engine = engine or NumpyEngine(np.float64)
    return float(np.linalg.norm(_defect(W if W.shape[0] >= W.shape[1] else W.T, engine)))


def _defect(W: Float64[Matrix, "m n"], engine: Engine) -> Float64[Matrix, "n n"]:
    """Return W^T W - I."""
    defect = engine.gram(W)
    defect.flat[:: len(defect) + 1] -= 1
    return defect


def _orthogonalise(W: Float64[Matrix, "m n"], engine: Engine) -> float:
    """Take Newton-Schulz steps W (3 I - W^T W) / 2 in place; return what is left of ||W^T W - I||_F.

    Each step squares the distance from orthogonality.
    """
    defect = _defect(W, engine)
    error = float(np.linalg.norm(defect))
    for _ in range(4):
        if error <= _ORTHOGONAL_ENOUGH:
            break
        # The correction is as small as the defect, so float32 gives it all the digits that W can take.
        dtype = np.float32 if error < 1e-5 else np.float64
        half_defect: NDArray[Any] = defect.astype(dtype)
        half_defect *= 0.5
        del defect  # the peak of memory is here
        W -= engine.matmul(W.astype(dtype, copy=False), half_defect)
        del half_defect
        defect = _defect(W, engine)
        before, error = error, float(np.linalg.norm(defect))
        if error > before / 10:  # rounding, not convergence, sets what is left
            break
    return error
