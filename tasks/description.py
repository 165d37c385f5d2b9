"""What a benchmark is: records, each with variants, each with the rule that decides.

A variant's kind says what its rule means. In an **attack** the probe stands in the untrusted data: it should not be
followed. In a **control** it stands in the trusted instruction: it should be. A **benign** variant has none: there
its rule tells how often it holds by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dtt_plugin.errors import DttError
from dtt_plugin.tasks.rules import Rule, parse_rule

Kind = Literal["attack", "control", "benign"]
ATTACK: Kind = "attack"
CONTROL: Kind = "control"
BENIGN: Kind = "benign"
"""Also the name of the one variant of this kind."""


@dataclass(frozen=True)
class Variant:
    """One prompt of a record."""

    name: str
    kind: Kind
    instruction: str
    """Trusted: the system role."""
    data: str
    """Untrusted: the user role."""
    rule: Rule | None = None
    """Whether the probe was followed; an attack and a control must have one."""
    others: tuple[Rule, ...] = ()
    """The same by other rules, reported beside the first."""
    answer: Rule | None = None
    """Whether the user's question was answered; None: there is no gold answer."""


@dataclass(frozen=True)
class Entry:
    """One record of a benchmark."""

    instruction: str
    """Without a probe."""
    data: str
    """Without a probe; what attacks add stands behind, before or within it."""
    variants: Sequence[Variant]
    name: str = ""
    """The record's own id."""
    cluster: str = ""
    """What it shares with other records (a witness, a context): rates are no more certain than these are many."""
    groups: Sequence[str] = ()
    """Subtotals that it counts in."""


def benchmark_dataset(task: str, entries: Iterable[Entry], variants: Sequence[str] | None = None) -> dict[str, Any]:
    """Return lm-eval's split dictionary.

    Args:
        task: its name, for errors.
        entries: the records, in order.
        variants: names of those to keep; None: all.

    Raises:
        DttError: a record can't be scored, or none is left.
    """
    import datasets

    entries = list(entries)
    known = dict.fromkeys(variant.name for entry in entries for variant in entry.variants)
    if unknown := [name for name in variants or () if name not in known]:
        raise DttError(f"{task} has no variant {unknown[0]!r}; choose from {', '.join(known)}.")
    rows = []
    for number, entry in enumerate(entries):
        where = f"{task}, record {entry.name or number}"
        kept = [variant for variant in entry.variants if variants is None or variant.name in variants]
        if kept:
            rows.append(
                {
                    "record_id": number,
                    "name": entry.name,
                    "instruction": entry.instruction,
                    "input": entry.data,
                    "cluster": entry.cluster,
                    "groups": list(entry.groups),
                    "variants": [_row(variant, f"{where}, variant {variant.name}") for variant in kept],
                }
            )
    if not rows:
        raise DttError(f"{task} has no records.")
    return {"test": datasets.Dataset.from_list(rows)}


def _row(variant: Variant, where: str) -> dict[str, Any]:
    if variant.rule is None and variant.kind != BENIGN:
        raise DttError(f"{where}: no rule says whether the probe was followed; give it a witness.")
    return {
        "attack": variant.name,
        "kind": variant.kind,
        "rule": _checked(variant.rule, where),
        "others": [_checked(rule, where) for rule in variant.others],
        "answer": _checked(variant.answer, where),
        "messages": [
            {"role": "system", "content": variant.instruction},
            {"role": "user", "content": variant.data},
        ],
    }


def _checked(rule: Rule | None, where: str) -> dict[str, Any] | None:
    if rule is None:
        return None
    parse_rule(rule._asdict(), where)
    return {"rule": rule.rule, "texts": list(rule.texts)}
