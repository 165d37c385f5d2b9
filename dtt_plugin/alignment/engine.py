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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.errors import DttError

Matrix = NDArray[np.float64]
# Below this many multiplications float64 products cost less than deciding against them.
SMALL_PRODUCT = 2**36


class Eigh(NamedTuple):
    """Eigenvalues (d,), ascending, and eigenvectors (d, d) in columns."""

    values: Matrix
    vectors: Matrix


class Svd(NamedTuple):
    """M = u diag(s) vt, thin, s descending."""

    u: Matrix
    s: Matrix
    vt: Matrix


class Cross(Protocol):
    """The sum over blocks of x^T y, in float64."""

    def add(self, x: NDArray[Any], y: NDArray[Any], *, bfloat16: bool) -> None:
        """Add x^T y: x (b, d_s), y (b, d_t); `bfloat16` promises that the values are bfloat16 numbers."""

    def total(self) -> Matrix:
        """Return the sum, (d_s, d_t)."""


class Engine(Protocol):
    """What an alignment computes with; arrays are numpy arrays on both sides."""

    name: str
    work_dtype: Any

    def float_block(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Convert a block as it is stored to `work_dtype`."""

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products."""

    def matmul(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        """Return a @ b in the type of the operands."""

    def gram(self, a: Matrix) -> Matrix:
        """Return a^T a, exactly symmetric."""

    def eigh(self, a: Matrix) -> Eigh:
        """Return the eigenvalues and eigenvectors of the symmetric matrix `a`, which may be overwritten."""

    def svd(self, a: Matrix) -> Svd:
        """Return the thin singular value decomposition of `a`."""


class NumpyEngine:
    """numpy and SciPy; the products of blocks in `work_dtype`."""

    def __init__(self, work_dtype: Any = np.float32) -> None:
        self.work_dtype = np.dtype(work_dtype)
        self.name = f"numpy {self.work_dtype.name}"

    def float_block(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Convert a block; bfloat16 is the upper half of a float32, so a shift does it."""
        if raw.dtype.name == "bfloat16":
            out = np.empty(raw.shape, np.float32)
            np.left_shift(raw.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
            return out.astype(self.work_dtype, copy=False)
        return np.asarray(raw, self.work_dtype)

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products."""
        return _NumpyCross(d_s, d_t, self.work_dtype)

    def matmul(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        """Return a @ b."""
        product: NDArray[Any] = a @ b
        return product

    def gram(self, a: Matrix) -> Matrix:
        """Return a^T a; numpy computes one triangle and mirrors it."""
        product: Matrix = a.T @ a
        return product

    def eigh(self, a: Matrix) -> Eigh:
        """Divide and conquer, in place where possible."""
        return Eigh(*np.linalg.eigh(a))

    def svd(self, a: Matrix) -> Svd:
        """Divide and conquer; SciPy falls back on nothing, so failure is said."""
        from scipy import linalg

        try:
            return Svd(*linalg.svd(a, full_matrices=False, check_finite=False))
        except linalg.LinAlgError as error:
            raise DttError(f"The singular values did not converge ({error}); check the embeddings.") from error


class _NumpyCross:
    def __init__(self, d_s: int, d_t: int, work_dtype: np.dtype[Any]) -> None:
        self._sum = np.zeros((d_s, d_t))
        self._product = np.empty((d_s, d_t), work_dtype)

    def add(self, x: NDArray[Any], y: NDArray[Any], *, bfloat16: bool) -> None:
        np.matmul(x.T, y, out=self._product)
        self._sum += self._product

    def total(self) -> Matrix:
        return self._sum


class TorchEngine(NumpyEngine):
    """torch on a device: bfloat16 products on a processor that has them, everything on CUDA."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        super().__init__(np.float32)
        self._torch = torch
        self.device = device
        self.name = f"torch {device} float32"

    def float_block(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Convert a block with all cores, into numpy's memory, which comes in large pages."""
        if raw.dtype.name != "bfloat16":
            return super().float_block(raw)
        out = np.empty(raw.shape, np.float32)
        stored = self._torch.from_numpy(raw.view(np.int16)).view(self._torch.bfloat16)
        self._torch.from_numpy(out).copy_(stored)
        return out

    def cross(self, d_s: int, d_t: int) -> Cross:
        """Return an empty sum of products on the device."""
        if self.device == "cpu":
            return _TorchCpuCross(self._torch, d_s, d_t)
        return _TorchDeviceCross(self._torch, self.device, d_s, d_t)

    def eigh(self, a: Matrix) -> Eigh:
        """Divide and conquer of MKL or cuSOLVER."""
        values, vectors = self._torch.linalg.eigh(self._to(a))
        return Eigh(self._from(values), self._from(vectors))

    def matmul(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        """Return a @ b; on the processor numpy's product is as fast."""
        if self.device == "cpu":
            return super().matmul(a, b)
        return self._from(self._to(a) @ self._to(b))

    def gram(self, a: Matrix) -> Matrix:
        """Return a^T a; on the processor numpy's symmetric product is faster."""
        if self.device == "cpu":
            return super().gram(a)
        tensor = self._to(a)
        return self._from(tensor.T @ tensor)

    def svd(self, a: Matrix) -> Svd:
        """On the processor SciPy's."""
        if self.device == "cpu":
            return super().svd(a)
        return Svd(*map(self._from, self._torch.linalg.svd(self._to(a), full_matrices=False)))

    def _to(self, a: NDArray[Any]) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(a)).to(self.device)

    def _from(self, tensor: Any) -> NDArray[Any]:
        array: NDArray[Any] = tensor.cpu().numpy()
        return array


class _TorchCpuCross(_NumpyCross):
    """Products by torch, on numpy's memory; numpy adds a float32 matrix to a float64 one faster."""

    def __init__(self, torch: Any, d_s: int, d_t: int) -> None:
        super().__init__(d_s, d_t, np.dtype(np.float32))
        self._torch, self._out = torch, torch.from_numpy(self._product)

    def add(self, x: NDArray[Any], y: NDArray[Any], *, bfloat16: bool) -> None:
        with _float32_products(self._torch, bfloat16=bfloat16):
            self._torch.mm(self._torch.from_numpy(x).T, self._torch.from_numpy(y), out=self._out)
        self._sum += self._product


class _TorchDeviceCross:
    """Products and their sum in the memory of a device."""

    def __init__(self, torch: Any, device: str, d_s: int, d_t: int) -> None:
        self._torch, self._device = torch, device
        self._sum = torch.zeros((d_s, d_t), dtype=torch.float64, device=device)
        self._product = torch.empty((d_s, d_t), dtype=torch.float32, device=device)

    def add(self, x: NDArray[Any], y: NDArray[Any], *, bfloat16: bool) -> None:
        torch = self._torch
        source, target = (torch.from_numpy(block).to(self._device) for block in (x, y))
        if bfloat16:
            # The values are bfloat16 numbers, so this conversion loses nothing.
            torch.mm(source.bfloat16().T, target.bfloat16(), out_dtype=torch.float32, out=self._product)
        else:
            with _float32_products(torch, bfloat16=False):
                torch.mm(source.T, target, out=self._product)
        self._sum += self._product

    def total(self) -> Matrix:
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
