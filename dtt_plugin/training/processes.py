"""Several processes that train together, one a device, as `accelerate launch` or `torchrun` start them.

Each computes its share of every batch. What they exchange in a step is the gradient, k x d numbers, and three sums; the
frozen weights never move. One of them writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtt_plugin.errors import DttError


def is_main() -> bool:
    """Return whether this process is the one that writes; a process by itself is."""
    return int(os.environ.get("RANK", "0")) == 0


def share(batch: int, processes: int) -> int:
    """Return how many examples of a batch one process takes.

    Raises:
        DttError: they can't be divided evenly.
    """
    if batch % processes:
        raise DttError(
            f"--batch {batch} can't be divided among {processes} processes; give a multiple of {processes}, or start"
            " another number of them."
        )
    return batch // processes


def from_main(value: Any) -> Any:
    """Return the main process's `value` in every process; all have to ask."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def in_any(flag: bool) -> bool:
    """Return whether any process's `flag` is set; all have to ask."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    return bool(reduce(torch.tensor(float(flag), device=PartialState().device), "sum") > 0)


def wait() -> None:
    """Wait for every process."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process do something before the others, which then find its result in a cache."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield
