"""Libraries that only some benchmarks need, in the extra `benchmarks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dtt_plugin.errors import MissingDataError


@contextmanager
def benchmark_libraries() -> Iterator[None]:
    """Turn a failing import into an error that names the extra.

    Raises:
        MissingDataError: a library is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDataError(
            f"This benchmark needs {error.name}; install it with pip install 'dtt-plugin[benchmarks]'."
        ) from error
