"""Both engines compute the same; what a caller had set in torch survives."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtt_plugin.alignment import engine as engines
from dtt_plugin.alignment import workers
from dtt_plugin.alignment.engine import NumpyEngine, TorchEngine, choose_engine
from dtt_plugin.alignment.polar import polar_factor
from dtt_plugin.errors import DttError


def torch_devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def blocks() -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((512, 96)), rng.standard_normal((512, 80))) for _ in range(4)]


@pytest.mark.parametrize("device", torch_devices())
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_torch_sums_the_products_of_the_stored_values(device: str, dtype: Any) -> None:
    engine = TorchEngine(device)
    cross, exact = engine.cross(96, 80), np.zeros((96, 80))
    for x, y in blocks():
        stored = x.astype(dtype), y.astype(dtype)
        a, b = (engine.float_block(side) for side in stored)
        np.testing.assert_array_equal(a, stored[0].astype(np.float32))
        cross.add(a, b, bfloat16=dtype is ml_dtypes.bfloat16)
        exact += stored[0].astype(np.float64).T @ stored[1].astype(np.float64)
    assert np.linalg.norm(cross.total() - exact) < 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("device", torch_devices())
@pytest.mark.parametrize("decades", [2, 8])
def test_the_polar_factor_is_the_same_with_torch(device: str, decades: int) -> None:
    u, _, vt = np.linalg.svd(np.random.default_rng(0).standard_normal((96, 80)), full_matrices=False)
    M = u * np.logspace(0, -decades, 80) @ vt
    polar = polar_factor(M, TorchEngine(device))
    assert polar.orthogonality_error < 1e-12
    np.testing.assert_allclose(polar.W, polar_factor(M).W, atol=1e-7)


def test_the_way_torch_multiplies_is_left_as_it_was() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        x = np.ones((4, 4), np.float32)
        TorchEngine("cpu").cross(4, 4).add(x, x, bfloat16=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_numpy_converts_every_bfloat16_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    np.testing.assert_array_equal(NumpyEngine().float_block(every), every.astype(np.float32))


@pytest.mark.parametrize("n", [7, 1000])
def test_division_by_a_matrix_is_that_by_its_inverse_however_many_threads_share_it(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "blas_threads", lambda: 3)
    rng = np.random.default_rng(0)
    a = (np.eye(600) + 0.01 * rng.standard_normal((600, 600))).astype(np.float32)
    b = rng.standard_normal((n, 600)).astype(np.float32)
    exact = b.astype(np.float64) @ np.linalg.inv(a.astype(np.float64))
    for ordered in (a.copy(), np.asfortranarray(a)):
        found = NumpyEngine(np.float32).divide(b.copy(), ordered)
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_sums_in_a_narrower_type_are_added_exactly() -> None:
    rng = np.random.default_rng(0)
    total, more = rng.standard_normal((70, 33)), rng.standard_normal((70, 33)).astype(np.float32)
    expected = total + more
    engines._add(total, more)
    np.testing.assert_array_equal(total, expected)


def test_the_engine_follows_size_type_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(multiplications: int, *, bfloat16: bool) -> str:
        return choose_engine("auto", multiplications=multiplications, bfloat16=bfloat16).name

    monkeypatch.setattr(engines, "_nvidia_driver", lambda: False)
    monkeypatch.setattr(engines, "_bfloat16_units", lambda: False)
    assert name(10**6, bfloat16=True) == "numpy float64"
    assert name(10**12, bfloat16=True) == "numpy float32"
    monkeypatch.setattr(engines, "_bfloat16_units", lambda: True)
    assert name(10**12, bfloat16=False) == "numpy float32"
    if torch_devices():
        assert name(10**12, bfloat16=True) == "torch cpu float32"


def test_asking_for_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    with pytest.raises(DttError, match="finds no CUDA device"):
        choose_engine("cuda", multiplications=1, bfloat16=True)
