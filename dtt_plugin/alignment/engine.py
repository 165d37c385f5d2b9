"""The arithmetic behind an alignment: one small interface, numpy by default, torch where it is faster.

Measured on two cores of a Xeon with AMX (128256 x 4096, see docs/alignment.md):
oneDNN, which torch brings, multiplies bfloat16 values twice as fast as the best
float32 product, and exactly as well: products of two bfloat16 numbers are exact
in float32, and they are added up in float32. Processors without such units, and
machines without torch, use numpy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.workers import Workers
from dtt_plugin.arrays import Float, Float64
from dtt_plugin.errors import DttError

Matrix = NDArray[np.float64]
# Below this many multiplications float64 products cost less than deciding against them.
SMALL_PRODUCT = 2**36
# Reflections of an eigenproblem that are applied at once, and to how many rows.
_REFLECTIONS = 128
_ROWS_AT_ONCE = 256
# Rows that are converted at once, where the result is needed once.
_FEW_ROWS = 32


class Eigh(NamedTuple):
    """Eigenvalues (d,), ascending, and eigenvectors (d, d) in columns."""

    values: Float64[Matrix, " d"]
    vectors: Float64[Matrix, "d d"]


class Svd(NamedTuple):
    """M = u diag(s) vt, thin, s descending."""

    u: Float64[Matrix, "m r"]
    s: Float64[Matrix, " r"]
    vt: Float64[Matrix, "r n"]


@runtime_checkable
class Cross(Protocol):
    """The sum over blocks of x^T y, in float64."""

    def add(self, x: Float[NDArray[Any], "n d_s"], y: Float[NDArray[Any], "n d_t"], *, bfloat16: bool) -> None:
        """Add x^T y: x (b, d_s), y (b, d_t); `bfloat16` promises that the values are bfloat16 numbers.

        The block before it is in the sum when this returns; x and y may be needed until `finish`, or the next one.
        """

    def finish(self) -> None:
        """Return when every block is in the sum."""

    def total(self) -> Float64[Matrix, "d_s d_t"]:
        """Return the sum, (d_s, d_t)."""


@runtime_checkable
class Engine(Protocol):
    """What an alignment computes with; arrays are numpy arrays on both sides."""

    name: str
    work_dtype: Any

    def float_block(self, raw: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Convert a block as it is stored to `work_dtype`; into `out`, if given."""

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products."""

    def matmul(self, a: Float[NDArray[Any], "m n"], b: Float[NDArray[Any], "n p"]) -> Float[NDArray[Any], "m p"]:
        """Return a @ b in the type of the operands."""

    def gram(self, a: Float64[Matrix, "n d"]) -> Float64[Matrix, "d d"]:
        """Return a^T a, exactly symmetric."""

    def eigh(self, a: Float64[Matrix, "d d"]) -> Eigh:
        """Return the eigenvalues and eigenvectors of the symmetric matrix `a`, which may be overwritten."""

    def svd(self, a: Float64[Matrix, "m n"]) -> Svd:
        """Return the thin singular value decomposition of `a`."""

    def divide(self, b: Float[NDArray[Any], "n d"], a: Float[NDArray[Any], "d d"]) -> Float[NDArray[Any], "n d"]:
        """Return b a^-1, (n, d), for `a` (d, d), best in Fortran's order; both may be overwritten."""


class NumpyEngine:
    """numpy and SciPy; the products of blocks in `work_dtype`."""

    def __init__(self, work_dtype: Any = np.float32, workers: Workers | None = None) -> None:
        self.work_dtype = np.dtype(work_dtype)
        self.name = f"numpy {self.work_dtype.name}"
        self.workers = workers or Workers()

    def float_block(self, raw: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Convert a block."""
        if out is None:
            return raw.astype(self.work_dtype, copy=False)
        np.copyto(out, raw, casting="unsafe")
        return out

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products."""
        return _NumpyCross(self.workers, d_s, d_t, self.work_dtype)

    def matmul(self, a: Float[NDArray[Any], "m n"], b: Float[NDArray[Any], "n p"]) -> Float[NDArray[Any], "m p"]:
        """Return a @ b."""
        product = np.empty((len(a), b.shape[1]), np.result_type(a, b))
        self.workers.over_strips(len(a), lambda strip: np.matmul(a[strip], b, out=product[strip]))
        return product

    def gram(self, a: Float64[Matrix, "n d"]) -> Float64[Matrix, "d d"]:
        """Return a^T a; the lower triangle is computed and mirrored."""
        n = a.shape[1]
        product: Matrix = np.empty((n, n))

        def strip_of_rows(from_the_end: slice) -> None:
            # The last rows are the longest, and so the first to be done.
            start, stop = n - from_the_end.stop, n - from_the_end.start
            rows = product[start:stop, :stop]
            np.matmul(a[:, start:stop].T, a[:, :stop], out=rows)
            corner = rows[:, start:]
            corner[:] = np.tril(corner) + np.tril(corner, -1).T
            product[:start, start:stop] = rows[:, :start].T

        self.workers.over_strips(n, strip_of_rows)
        return product

    def eigh(self, a: Float64[Matrix, "d d"]) -> Eigh:
        """Tridiagonalise, divide and conquer, transform back: LAPACK's three steps.

        The first two have little to share between threads: half of the first is memory traffic. The third is
        as much arithmetic as both, and LAPACK does it in blocks too small for full speed.
        """
        from scipy.linalg import lapack

        n = len(a)
        if n < 3:
            return Eigh(*np.linalg.eigh(a))
        # The transpose of a symmetric matrix is the same matrix, in the order that LAPACK overwrites.
        lwork = int(lapack.dsytrd_lwork(n, lower=1)[0])
        reduced, diagonal, beside, tau, _ = lapack.dsytrd(a.T, lower=1, lwork=lwork, overwrite_a=1)
        values, vectors, failed = lapack.dstevd(diagonal, beside)
        if failed:
            raise DttError("The eigenvalues of the cross-covariance did not converge; check the embeddings.")
        self._reflect(reduced, tau, vectors.T)
        return Eigh(values, vectors)

    def _reflect(self, reduced: Matrix, tau: Matrix, rows: Matrix) -> None:
        """Apply dsytrd's reflections to `rows` (n, n), in place: row x becomes x Q^T, Q = H_0 H_1 ... H_(n-2).

        H_i = I - tau_i v_i v_i^T, where v_i is 0 up to i, 1 at i + 1, and stands in column i of `reduced` below.
        A block of them is I - V T V^T with an upper triangular T (Schreiber and Van Loan 1989).
        """
        blocks = []
        for first in range(0, len(tau), _REFLECTIONS):
            last = min(first + _REFLECTIONS, len(tau))
            V = reduced[first + 1 :, first:last]  # (n - first - 1, last - first)
            head = V[: last - first]
            head[:] = np.tril(head, -1)
            head.flat[:: len(head) + 1] = 1
            overlap = V.T @ V
            T = np.zeros_like(overlap)
            for i, factor in enumerate(tau[first:last]):
                T[:i, i] = -factor * (T[:i, :i] @ overlap[:i, i])
                T[i, i] = factor
            blocks.append((V, T))

        def strip_of_rows(strip: slice) -> None:
            # Few at a time, which keeps the products small beside the matrix.
            for start in range(strip.start, strip.stop, _ROWS_AT_ONCE):
                few = rows[start : min(start + _ROWS_AT_ONCE, strip.stop)]
                for V, T in reversed(blocks):
                    part = few[:, -len(V) :]
                    part -= ((part @ V) @ T.T) @ V.T

        self.workers.over_strips(len(rows), strip_of_rows)

    def svd(self, a: Float64[Matrix, "m n"]) -> Svd:
        """Divide and conquer; SciPy falls back on nothing, so failure is said."""
        from scipy import linalg

        try:
            return Svd(*linalg.svd(a, full_matrices=False, check_finite=False))
        except linalg.LinAlgError as error:
            raise DttError(f"The singular values did not converge ({error}); check the embeddings.") from error

    def divide(self, b: Float[NDArray[Any], "n d"], a: Float[NDArray[Any], "d d"]) -> Float[NDArray[Any], "n d"]:
        """Factorise once; rows of b are shared by all threads."""
        from scipy import linalg

        # SciPy's, because numpy's solvers convert to float64; a^T x^T = b^T, in the order that needs no copy.
        lu, pivots = linalg.lu_factor(a, overwrite_a=True, check_finite=False)

        def strip_of_rows(strip: slice) -> None:
            # SciPy's wrapper counts the pivots from 1 meanwhile, in their own memory.
            factors = lu, pivots.copy()
            b[strip] = linalg.lu_solve(factors, b[strip].T, trans=1, overwrite_b=True, check_finite=False).T

        self.workers.over_strips(len(b), strip_of_rows)
        return b


class _NumpyCross:
    """Strips of the sum, each added to by whoever is free, block after block; no block waits for a whole other one."""

    def __init__(self, workers: Workers, d_s: int, d_t: int, work_dtype: np.dtype[Any]) -> None:
        self._workers = workers
        self._sum = np.zeros((d_s, d_t))
        self._product = np.empty((d_s, d_t), work_dtype)
        self._earlier: list[Future[None]] = []
        self._latest: list[Future[None]] = []

    def add(self, x: Float[NDArray[Any], "n d_s"], y: Float[NDArray[Any], "n d_t"], *, bfloat16: bool) -> None:
        def strip_of_rows(strip: slice) -> None:
            np.matmul(x.T[strip], y, out=self._product[strip])
            _add(self._sum[strip], self._product[strip])

        self._earlier, self._latest = self._latest, self._workers.after(self._latest, len(self._sum), strip_of_rows)
        # Two blocks at most are in memory for this.
        _finish(self._earlier)

    def finish(self) -> None:
        _finish(self._latest)

    def total(self) -> Float64[Matrix, "d_s d_t"]:
        self.finish()
        return self._sum


def _finish(tasks: list[Future[None]]) -> None:
    for task in tasks:
        task.result()


def _add(total: Matrix, more: NDArray[Any]) -> None:
    """Add `more`, in a narrower type, to `total`: a few rows at a time, converted in the processor's cache."""
    few = np.empty((_FEW_ROWS, total.shape[1]))
    for start in range(0, len(total), _FEW_ROWS):
        rows = total[start : start + _FEW_ROWS]
        converted = few[: len(rows)]
        converted[:] = more[start : start + _FEW_ROWS]
        rows += converted


class TorchEngine(NumpyEngine):
    """torch on a device: bfloat16 products on a processor that has them, everything on CUDA."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        super().__init__(np.float32, Workers(self._one_thread))
        self._torch = torch
        self.device = device
        self.name = f"torch {device} float32"

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products on the device."""
        if self.device == "cpu":
            return _TorchCpuCross(self._torch, self.workers, d_s, d_t)
        return _TorchDeviceCross(self._torch, self.device, d_s, d_t)

    def eigh(self, a: Float64[Matrix, "d d"]) -> Eigh:
        """Divide and conquer of cuSOLVER."""
        if self.device == "cpu":
            return super().eigh(a)
        values, vectors = self._torch.linalg.eigh(self._to(a))
        return Eigh(self._from(values), self._from(vectors))

    def matmul(self, a: Float[NDArray[Any], "m n"], b: Float[NDArray[Any], "n p"]) -> Float[NDArray[Any], "m p"]:
        """Return a @ b; on the processor numpy's product is as fast."""
        if self.device == "cpu":
            return super().matmul(a, b)
        return self._from(self._to(a) @ self._to(b))

    def gram(self, a: Float64[Matrix, "n d"]) -> Float64[Matrix, "d d"]:
        """Return a^T a; on the processor numpy's symmetric product is faster."""
        if self.device == "cpu":
            return super().gram(a)
        tensor = self._to(a)
        return self._from(tensor.T @ tensor)

    def svd(self, a: Float64[Matrix, "m n"]) -> Svd:
        """On the processor SciPy's."""
        if self.device == "cpu":
            return super().svd(a)
        return Svd(*map(self._from, self._torch.linalg.svd(self._to(a), full_matrices=False)))

    def _one_thread(self) -> None:
        """Keep torch from starting threads for the thread that calls this."""
        from threadpoolctl import threadpool_limits

        self._torch.get_num_threads()  # torch sets its number with the first call in a thread
        threadpool_limits(1, "openmp")

    def _to(self, a: NDArray[Any]) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(a)).to(self.device)

    def _from(self, tensor: Any) -> NDArray[Any]:
        array: NDArray[Any] = tensor.cpu().numpy()
        return array


class _TorchCpuCross(_NumpyCross):
    """Products by torch; numpy adds a float32 matrix to a float64 one faster."""

    def __init__(self, torch: Any, workers: Workers, d_s: int, d_t: int) -> None:
        super().__init__(workers, d_s, d_t, np.dtype(np.float32))
        self._torch, self._out = torch, torch.from_numpy(self._product)

    def add(self, x: Float[NDArray[Any], "n d_s"], y: Float[NDArray[Any], "n d_t"], *, bfloat16: bool) -> None:
        source, target = self._torch.from_numpy(x).T, self._torch.from_numpy(y)

        def strip_of_rows(strip: slice) -> None:
            self._torch.mm(source[strip], target, out=self._out[strip])
            _add(self._sum[strip], self._product[strip])

        with _float32_products(self._torch, bfloat16=bfloat16):
            self._workers.over_strips(len(self._sum), strip_of_rows)


class _TorchDeviceCross:
    """Products and their sum in the memory of a device."""

    def __init__(self, torch: Any, device: str, d_s: int, d_t: int) -> None:
        self._torch, self._device = torch, device
        self._sum = torch.zeros((d_s, d_t), dtype=torch.float64, device=device)
        self._product = torch.empty((d_s, d_t), dtype=torch.float32, device=device)

    def add(self, x: Float[NDArray[Any], "n d_s"], y: Float[NDArray[Any], "n d_t"], *, bfloat16: bool) -> None:
        torch = self._torch
        source, target = (torch.from_numpy(block).to(self._device) for block in (x, y))
        if bfloat16:
            # The values are bfloat16 numbers, so this conversion loses nothing.
            torch.mm(source.bfloat16().T, target.bfloat16(), out_dtype=torch.float32, out=self._product)
        else:
            with _float32_products(torch, bfloat16=False):
                torch.mm(source.T, target, out=self._product)
        self._sum += self._product

    def finish(self) -> None:
        pass  # the sum is asked for behind all of it

    def total(self) -> Float64[Matrix, "d_s d_t"]:
        total: Matrix = self._sum.cpu().numpy()
        return total


@contextmanager
def _float32_products(torch: Any, *, bfloat16: bool) -> Iterator[None]:
    """Set how torch multiplies float32 matrices, and set it back: a caller's choice must survive."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_engine(device: str, *, multiplications: int, bfloat16: bool) -> Engine:
    """Return what suits a problem of this size on this machine.

    Args:
        device: "auto", "cpu" or "cuda".
        multiplications: of the cross-covariance, rows x d_s x d_t.
        bfloat16: whether both embeddings hold bfloat16 numbers.

    Raises:
        DttError: CUDA was asked for and is not there.
    """
    if device == "cuda" or (device == "auto" and multiplications >= SMALL_PRODUCT and _nvidia_driver()):
        if _cuda():
            return TorchEngine("cuda")
        if device == "cuda":
            raise DttError("device=cuda: torch finds no CUDA device; use --device cpu.")
    if multiplications < SMALL_PRODUCT:
        return NumpyEngine(np.float64)
    if bfloat16 and _bfloat16_units() and importlib.util.find_spec("torch"):
        return TorchEngine("cpu")
    return NumpyEngine(np.float32)


def _nvidia_driver() -> bool:
    # Importing torch to find out would cost seconds on machines without a GPU.
    return Path("/proc/driver/nvidia/version").exists()


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (Linux only; elsewhere: no)."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
