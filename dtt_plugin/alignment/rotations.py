"""Random orthogonal maps that are applied without being formed; as a matrix, SciPy's `ortho_group` draws one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Matrix
from dtt_plugin.arrays import Float32, Float64


def haar_rotation(rows: Float64[NDArray[np.float64], "k d"], generator: np.random.Generator) -> Float64[Matrix, "k d"]:
    """Apply a uniformly random orthogonal map to few `rows` (k, d) without forming it.

    One Householder reflection of a random vector per dimension, each in one dimension less, and a random sign
    (G. W. Stewart, SIAM J. Numer. Anal. 17, 1980). The map depends on the generator and d alone.
    """
    rows = rows.copy()
    d = rows.shape[1]
    signs = np.empty(d)
    for start in range(d - 1):
        v = generator.standard_normal(d - start)
        signs[start] = -1.0 if v[0] >= 0 else 1.0
        v[0] -= signs[start] * np.linalg.norm(v)
        part = rows[:, start:]
        part -= np.outer(part @ v, v * (2 / (v @ v)))
    signs[-1] = generator.choice([-1.0, 1.0])
    turned: Matrix = rows * signs
    return turned


def mixing_rotation(
    rows: Float32[NDArray[np.float32], "n d"], generator: np.random.Generator
) -> Float32[NDArray[np.float32], "n d"]:
    """Apply a seeded random orthogonal map to many `rows` (n, d): three rounds of random signs and a cosine transform.

    Fast, and not uniform among rotations. A drawn d x d matrix would have to be orthogonalised first, which costs
    seconds and changes nothing where it is used.
    """
    from scipy import fft

    for _ in range(3):
        signs = generator.integers(0, 2, rows.shape[1]).astype(np.float32) * 2 - 1
        rows = fft.dct(rows * signs, norm="ortho", axis=1)
    return rows
