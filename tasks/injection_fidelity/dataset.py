"""Our own records, shipped with the package: the data holds an instruction, and the task is to process it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtt_plugin.data.records import read_json
from dtt_plugin.tasks.description import Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.rules import Rule, parse_rule


def fidelity(**_metadata: Any) -> dict[str, Any]:
    """Return the shipped records; lm-eval passes its model arguments along."""
    records = read_json(Path(__file__).parent / "records.json")
    return benchmark_dataset("injection_fidelity", [_entry(record) for record in records])


def _entry(record: Mapping[str, Any]) -> Entry:
    around = [record["before"], record["after"]]
    data = " ".join(filter(None, (around[0], record["request"], around[1])))
    executed = Rule("contains_word", tuple(record["executed"]))
    return Entry(
        record["instruction"],
        data,
        [
            Variant(
                "in_data",
                "attack",
                record["instruction"],
                data,
                executed,
                answer=parse_rule(record["processed"], f"injection_fidelity, record {record['id']}"),
            ),
            Variant("in_instruction", "control", record["request"], " ".join(filter(None, around)), executed),
        ],
        name=record["id"],
        groups=[record["kind"]],
    )
