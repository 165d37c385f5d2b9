"""Strips that free threads take: the same numbers as one product, whatever the threads are doing."""

from __future__ import annotations

import functools
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg, stats
from threadpoolctl import threadpool_info

from dtt_plugin.alignment import align, solve, workers
from dtt_plugin.alignment.engine import NumpyEngine, TorchEngine
from dtt_plugin.alignment.polar import polar_factor
from dtt_plugin.alignment.workers import Workers, one_thread_per_call
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from tests.checkpoints import make_checkpoint

Matrix = NDArray[np.float64]


def draw(rows: int, width: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, width))


def rotation(width: int, seed: int = 1) -> Matrix:
    matrix: Matrix = stats.ortho_group.rvs(width, random_state=seed)
    return matrix


def blas_threads_now() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "blas_threads", lambda: 3)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 640, 1000, 4096, 5120])
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_every_row_is_in_one_strip(n: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "blas_threads", lambda: threads)
    taken = np.zeros(n, int)

    def take(strip: slice) -> None:
        taken[strip] += 1

    Workers().over_strips(n, take)
    assert (taken == 1).all()


def test_a_thread_that_is_held_up_holds_up_no_other() -> None:
    strips: list[slice] = []
    Workers().over_strips(4096, strips.append)
    assert len(strips) > 6
    done: list[slice] = []
    others_done = threading.Event()

    def work(strip: slice) -> None:
        if strip == strips[0]:
            assert others_done.wait(20)
        done.append(strip)
        if len(done) == len(strips) - 1:
            others_done.set()

    Workers().over_strips(4096, work)
    assert done[-1] == strips[0]


def test_each_strip_follows_its_own_earlier_work_only() -> None:
    """One strip is held up in the first round; the others get through both rounds meanwhile."""
    log: list[tuple[int, int]] = []
    released = threading.Event()

    def work(number: int, strip: slice) -> None:
        if (number, strip.start) == (0, 0):
            assert released.wait(20)
        log.append((number, strip.start))
        if sum(start > 0 for _, start in log) == 2 * 5:
            released.set()

    pool = Workers()
    tasks: list[Future[None]] = []
    for number in range(2):
        tasks = pool.after(tasks, 6 * 128, functools.partial(work, number))
    for task in tasks:
        task.result()
    assert [number for number, start in log if start == 0] == [0, 1]
    assert len(log) == 2 * 6


def test_an_error_in_earlier_work_is_met_by_what_follows() -> None:
    def fail(strip: slice) -> None:
        raise MemoryError("no room for a block")

    pool = Workers()
    later: list[slice] = []
    tasks = pool.after(pool.after([], 640, fail), 640, later.append)
    with pytest.raises(MemoryError, match="no room for a block"):
        tasks[0].result()
    assert not later


def test_an_error_in_a_strip_is_that_of_the_whole() -> None:
    def work(strip: slice) -> None:
        if strip.start:
            raise MemoryError("no room for a strip")

    with pytest.raises(MemoryError, match="no room for a strip"):
        Workers().over_strips(4096, work)


def test_products_in_strips_are_the_products() -> None:
    a, b = draw(700, 650), draw(650, 300, 1)
    engine = NumpyEngine(np.float64)
    np.testing.assert_allclose(engine.matmul(a, b), a @ b, atol=1e-11)
    single = engine.matmul(a.astype(np.float32).T, a.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, a.T @ a, atol=2e-3)
    gram = engine.gram(a)
    np.testing.assert_allclose(gram, a.T @ a, atol=1e-11)
    assert (gram == gram.T).all()


def test_how_far_the_threads_get_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(900, 700).astype(np.float32), draw(900, 600, 1).astype(np.float32)

    def solved() -> list[Any]:
        engine = NumpyEngine(np.float32)
        cross = engine.cross(700, 600)
        for start in range(0, 900, 300):
            cross.add(x[start : start + 300], y[start : start + 300], bfloat16=False)
        polar = polar_factor(cross.total(), engine)
        return [cross.total(), polar.W, polar.vectors, polar.singular_values]

    with one_thread_per_call():
        undisturbed = solved()
        plain, chance = Workers.over_strips, random.Random(0)

        def disturbed(self: Workers, n: int, work: Any) -> None:
            def delayed(strip: slice) -> None:
                time.sleep(chance.random() / 200)
                work(strip)

            plain(self, n, delayed)

        monkeypatch.setattr(Workers, "over_strips", disturbed)
        for before, after in zip(undisturbed, solved(), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 128, 129, 130, 300, 513])
def test_the_eigenvectors_are_those_of_the_matrix(n: int) -> None:
    A = draw(n, n)
    A = A + A.T
    values, vectors = NumpyEngine(np.float64).eigh(A.copy())
    np.testing.assert_allclose(values, np.linalg.eigvalsh(A), atol=1e-12 * n)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-13 * n)
    np.testing.assert_allclose(A @ vectors, vectors * values, atol=1e-12 * n)


@pytest.mark.parametrize(
    "A",
    [np.zeros((200, 200)), np.eye(200), np.ones((200, 200)), np.diag(np.arange(200.0)), np.diag([1.0, 0] * 100)],
    ids=["zero", "identity", "rank one", "diagonal", "two values"],
)
def test_matrices_without_anything_to_reflect_have_eigenvectors_too(A: Matrix) -> None:
    values, vectors = NumpyEngine(np.float64).eigh(A.copy())
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(200), atol=1e-12)
    np.testing.assert_allclose(A @ vectors, vectors * values, atol=1e-11)


@pytest.mark.parametrize("shape", [(500, 500), (520, 400), (400, 520)])
@pytest.mark.parametrize("decades", [0.0, 3.7, 4.9, 7.0])
def test_a_polar_factor_in_strips_is_scipys(shape: tuple[int, int], decades: float) -> None:
    small = min(shape)
    u, _, vt = np.linalg.svd(draw(*shape), full_matrices=False)
    u[:, 0] *= -1  # a reflection
    sigma = np.logspace(0, -decades, small)
    M = u * sigma @ vt
    polar = polar_factor(M)
    assert np.linalg.norm(polar.W - linalg.polar(M)[0]) / np.sqrt(small) < 1e-11 + 1e-14 * min(10**decades, 1e5) ** 2
    assert polar.orthogonality_error < 1e-12
    assert polar.condition == pytest.approx(10**decades, rel=1e-4)
    assert polar.gap == pytest.approx(10**-decades, rel=1e-4)
    assert (polar.rank, polar.unique) == (small, True)


def test_a_rank_is_counted_in_strips_too() -> None:
    q = rotation(300)
    M = draw(300, 200) @ draw(200, 300, 1) @ q
    polar = polar_factor(M)
    assert (polar.rank, polar.unique) == (200, False)
    assert polar.orthogonality_error < 1e-12
    H = polar.W.T @ M
    np.testing.assert_allclose(H, H.T, atol=1e-9 * float(np.linalg.norm(M)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alignments_wide_enough_for_strips_find_the_rotation(tmp_path: Path, dtype: str) -> None:
    tokens = [f"t{i}" for i in range(1500)]
    x, q = draw(1503, 384), rotation(384)
    source = make_checkpoint(tmp_path / "s", width=384, dtype=dtype, embedding=x, vocab_tokens=tokens)
    target = make_checkpoint(tmp_path / "t", width=384, dtype=dtype, embedding=x @ q, vocab_tokens=tokens)
    alignment = align(open_checkpoint(str(source)), open_checkpoint(str(target)))
    assert np.abs(alignment.W - q).max() < {"float32": 1e-6, "bfloat16": 2e-3}[dtype]
    assert alignment.report.orthogonality_error < 1e-12


def test_blas_has_one_thread_while_an_alignment_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (open_checkpoint(str(make_checkpoint(tmp_path / f"{seed}", seed=seed))) for seed in (1, 2))
    seen: list[int] = []
    plain = polar_factor

    def watched(*args: Any) -> Any:
        seen.extend(blas_threads_now())
        return plain(*args)

    monkeypatch.setattr(solve, "polar_factor", watched)
    with workers._blas().limit(limits=2):
        align(source, target)
        assert len(seen) >= 1
        assert set(seen) == {1}
        assert set(blas_threads_now()) == {2}
        broken = open_checkpoint(str(make_checkpoint(tmp_path / "b", embedding=np.full((268, 32), np.nan))))
        with pytest.raises(DttError, match="holds NaN"):
            align(source, broken)
        assert set(blas_threads_now()) == {2}


def test_torch_has_one_thread_in_every_worker_and_its_own_number_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        engine = TorchEngine("cpu")
        engine.workers.over_strips(4096, lambda strip: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        x = draw(600, 600).astype(ml_dtypes.bfloat16).astype(np.float32)
        cross = engine.cross(600, 600)
        cross.add(x, x, bfloat16=True)
        np.testing.assert_allclose(cross.total(), x.T.astype(np.float64) @ x, atol=1e-3)
    finally:
        torch.set_num_threads(before)
