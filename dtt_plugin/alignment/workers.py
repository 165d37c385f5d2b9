"""Threads that share large products without waiting for each other, on a machine that does other things too.

A BLAS library splits every operation among its threads, each of which then waits, spinning, for the slowest.
Beside a busy process one of them has no core of its own: a product takes twice as long, and an eigenproblem with
its thousands of small operations ten times. Here BLAS has one thread per call, and large operations are cut into
strips. Whoever is free takes the next one, so a thread that the system puts aside delays only its own strip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

# Narrower strips cost speed: every one of them prepares the other factor anew.
_LOWEST_STRIP = 128


@functools.cache
def _blas() -> Any:
    """Return what controls the BLAS libraries of numpy and SciPy."""
    import scipy.linalg  # noqa: F401  (its BLAS is one of them, and is found only once it is loaded)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@functools.cache
def blas_threads() -> int:
    """Return how many threads BLAS had when it was first asked; OMP_NUM_THREADS and the like decide about them."""
    return max((library.num_threads for library in _blas().lib_controllers), default=1)


@contextmanager
def one_thread_per_call() -> Iterator[None]:
    """Keep BLAS from starting threads of its own, in the whole process; what was set before comes back."""
    blas_threads()  # before they are limited
    with _blas().limit(limits=1):
        yield


class Workers:
    """As many threads as BLAS was given; they start with the first work."""

    def __init__(self, initializer: Callable[[], object] | None = None) -> None:
        self._count = blas_threads()
        self._pool = ThreadPoolExecutor(self._count, "dtt-strip", initializer)

    def over_strips(self, n: int, work: Callable[[slice], object]) -> None:
        """Call `work` once for each strip of range(n), in any order, and return when all are done.

        Strips shrink towards the end, so that no thread is left alone with a large one. They depend on the
        number of threads only, never on their progress.
        """
        strips = []
        start = 0
        while start < n:
            height = max(_LOWEST_STRIP, (n - start) // (2 * self._count) // 64 * 64)
            strips.append(slice(start, min(start + height, n)))
            start += height
        if len(strips) == 1 or self._count == 1:
            for strip in strips:
                work(strip)
        else:
            for _ in self._pool.map(work, strips):
                pass

    def after(self, earlier: Sequence[Future[None]], n: int, work: Callable[[slice], object]) -> list[Future[None]]:
        """Start `work` for each of a few equal strips of range(n), and return at once.

        Args:
            earlier: what this returned for the same n, or nothing; each strip's work follows its earlier work.
            n: how many rows.
            work: what is done with a strip of them.
        """
        height = max(_LOWEST_STRIP, -(-n // (2 * self._count)))
        strips = [slice(start, min(start + height, n)) for start in range(0, n, height)]

        def follow(strip: slice, before: Future[None] | None) -> None:
            if before:
                before.result()
            work(strip)

        # Work is begun in this order, so what it follows has been begun before: no thread waits for one that can't.
        return [self._pool.submit(follow, strip, before) for strip, before in zip_longest(strips, earlier)]
