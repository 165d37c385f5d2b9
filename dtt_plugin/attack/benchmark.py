"""The records of a benchmark, as its task evaluates them."""

from __future__ import annotations

from typing import NamedTuple

from dtt_plugin.data.records import Record
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.alpacafarm_injection.dataset import alpacafarm_data
from dtt_plugin.tasks.injection_demo.dataset import demo_data


class Benchmark(NamedTuple):
    """What an attack needs of a benchmark."""

    task: str
    records: list[Record]
    sentences: list[str]


def load_benchmark(task: str) -> Benchmark:
    """Return the records and sentences of a task.

    Raises:
        DttError: unknown, or its data are not there.
    """
    if task == "injection_demo":
        return Benchmark(task, *demo_data())
    if task == "alpacafarm_injection":
        return Benchmark(task, *alpacafarm_data())
    raise DttError(f"--task {task} can't be attacked; choose alpacafarm_injection or injection_demo.")
