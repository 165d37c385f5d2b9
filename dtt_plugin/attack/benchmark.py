"""The records of a benchmark, as its task evaluates them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dtt_plugin.data.records import Record
from dtt_plugin.data.suffixes import EACH_ITS_OWN
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.alpacafarm_injection.dataset import alpacafarm_data
from dtt_plugin.tasks.attacks import HACKED, INJECTED_PROMPT
from dtt_plugin.tasks.injection_demo.dataset import demo_data
from dtt_plugin.tasks.injection_records.dataset import as_attacked, ignore_sentences, read_records
from dtt_plugin.tasks.rules import Rule

OWN = "injection_records"


class Benchmark(NamedTuple):
    """What an attack needs of a benchmark."""

    task: str
    records: Sequence[Record]
    sentences: list[str]
    prompts: Sequence[str] = ()
    """Per record, what the attacker wants followed; none: the benchmark's injected prompt."""
    rules: Sequence[Rule] = ()
    """Per record, whether it was; none: the benchmark's rule."""

    @property
    def injected_prompt(self) -> str:
        """As a file of attacks names it."""
        return EACH_ITS_OWN if self.prompts else INJECTED_PROMPT

    def rule(self, number: int) -> Rule:
        """Return whether a record's injected prompt was followed."""
        return self.rules[number] if self.rules else HACKED


def load_benchmark(task: str, own: Path | None = None) -> Benchmark:
    """Return the records and sentences of a task.

    Args:
        task: its name.
        own: the user's records, for `injection_records`.

    Raises:
        DttError: unknown, or its data are not there.
    """
    if task == OWN or own:
        if task != OWN or not own:
            raise DttError(f"--own FILE and --task {OWN} belong together; give both, or neither.")
        return _own(own)
    if task == "injection_demo":
        return Benchmark(task, *demo_data())
    if task == "alpacafarm_injection":
        return Benchmark(task, *alpacafarm_data())
    raise DttError(f"--task {task} can't be attacked; choose alpacafarm_injection, injection_demo or {OWN}.")


def _own(path: Path) -> Benchmark:
    read = read_records(path)
    if silent := [record.name for record in read if not record.probes[0].text]:
        raise DttError(f"{path}: record {silent[0]!r} has no injection that a suffix could stand behind; give it one.")
    rules = [record.probes[0].success for record in read]
    return Benchmark(OWN, as_attacked(read), ignore_sentences(), [record.probes[0].text for record in read], rules)
