"""Files of adaptive attacks (`dtt.attacks/1`): per record, the suffix that an attacker puts behind the injected data.

JSON lines: a header that says how the suffixes came to be and against what, then one line a record. A file holds no
text of the benchmark, so that it may be shared; what its records are is told by digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dtt_plugin.data.records import Record
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.reading import parse_json, read_bytes
from dtt_plugin.files.replacing import replacing
from dtt_plugin.safe_text import HALF_PAIR

FORMAT = "dtt.attacks/1"
IMPORTED = "imported"
EACH_ITS_OWN = "each record's own"
"""The injected prompt of records that have one each."""
SOFT = "soft"
"""The method that optimises vectors: an upper bound, without text that could be sent."""
ARM_FACTS = ("weights", "defense", "tokens_sha256", "prompt_format", "renderer_sha256")
"""What decides whether two arms are the same to an attacker; the dtt_ models report them under these names."""
_LONGEST_SUFFIX = 100_000


@dataclass(frozen=True)
class Suffix:
    """One record's line."""

    record_id: int
    """Place of the record in its benchmark, from 0."""
    record_sha256: str
    """From `record_digest`."""
    suffix: str | None
    """What follows the injected data, appended as it stands; None where the method makes no text."""
    loss: float | None = None
    """The lowest that the optimiser reached, nats a target token."""
    steps: int | None = None
    """Optimiser steps until the hit, or all."""
    hit: bool | None = None
    """Whether the optimiser's own greedy continuation was hacked; None: not tried on this record."""
    curve: list[list[float]] = field(default_factory=list)
    """[step, loss], every ten steps and at the last."""
    flops: int | None = None
    target: str | None = None
    """The beginning of a response that was optimised for."""


@dataclass(frozen=True)
class AttackFile:
    """What a file of adaptive attacks says."""

    method: str
    task: str
    """The benchmark's name, as lm-eval knows its task."""
    records_sha256: str
    """Over all records of the benchmark, from `records_digest`."""
    injected_prompt: str
    start: str
    """How the injected prompt is put into the data, in front of the suffix."""
    arm: dict[str, Any] | None
    """The arm that was attacked: `model` and `ARM_FACTS`; None where it is not known."""
    n_records: int
    """Of the benchmark."""
    budget: dict[str, Any]
    """Its name, and what it allows: candidates, steps, suffix tokens, seed, ..."""
    finished: bool = True
    flops: int | None = None
    """Of the forward and backward passes so far, attention's products left out."""
    search: dict[str, Any] | None = None
    """For a suffix that was optimised over several records: these records' numbers, losses and hits."""
    versions: dict[str, str] = field(default_factory=dict)
    suffixes: tuple[Suffix, ...] = ()

    @property
    def name(self) -> str:
        """Method and budget, as tables show it: `gcg@lite`."""
        budget = self.budget.get("name")
        return f"{self.method}@{budget}" if budget else self.method

    def header(self) -> dict[str, Any]:
        """Return the file's first line."""
        values = asdict(self)
        del values["suffixes"]
        return {"format": FORMAT, **values}


def record_digest(record: Record) -> str:
    """Return 16 hex digits that tell a record from others."""
    parts: Mapping[str, Any] = dict(record)
    # Of a user's own records also the injection and its rule; all of a benchmark share theirs.
    names = ("instruction", "input", "output", *(name for name in ("injection", "success") if name in parts))
    return sha256_json([parts[name] for name in names])[:16]


def records_digest(records: Sequence[Record]) -> str:
    """Return the SHA-256 over the digests of all records, in order."""
    return sha256_json([record_digest(record) for record in records])


def other_facts(arm: Mapping[str, Any] | None, evaluated: Mapping[str, Any]) -> list[str]:
    """Return in which facts the arm that was attacked is not the evaluated one; none: the attack is adaptive.

    Args:
        arm: from the file; None: not known, so that nothing agrees.
        evaluated: what the dtt_ models report about theirs.
    """
    known = arm or {}
    return [name for name in ARM_FACTS if name not in known or known[name] != evaluated.get(name)]


def write_attacks(path: Path, attacks: AttackFile) -> None:
    """Write the file, whole or not at all."""
    lines = [attacks.header(), *map(asdict, attacks.suffixes)]
    with replacing(path) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def read_attacks(path: Path) -> AttackFile:
    """Read a file of adaptive attacks.

    Raises:
        DttError: not such a file; names the line and the field.
    """
    try:
        lines = read_bytes(path).splitlines()
        values = [parse_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise DttError(f"{path} can't be read ({error.strerror}); give a file that `dtt attack` wrote.") from error
    except ValueError as error:
        raise DttError(f"{path} is not JSON lines ({error}); give a file that `dtt attack` wrote.") from error
    header = values[0] if values else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DttError(
            f"{path} is no file of adaptive attacks ({FORMAT}); make one with `dtt attack`, or from strings with"
            " `dtt attack --import`."
        )
    attacks = _built(path, 1, AttackFile, {**header, "suffixes": ()}, _HEADER)
    suffixes = [_built(path, number, Suffix, value, _SUFFIX) for number, value in enumerate(values[1:], 2)]
    seen: set[int] = set()
    for number, suffix in enumerate(suffixes, 2):
        text = suffix.suffix or ""
        if suffix.record_id in seen or suffix.record_id < 0:
            raise DttError(f"{path}, line {number}: record {suffix.record_id} is impossible, or there twice; mend it.")
        if HALF_PAIR.search(text) or len(text) > _LONGEST_SUFFIX:
            raise DttError(f"{path}, line {number}: the suffix is no text of at most {_LONGEST_SUFFIX} characters.")
        seen.add(suffix.record_id)
    return AttackFile(**{**vars(attacks), "suffixes": tuple(suffixes)})


_TEXT, _NUMBER = (str,), (int, float)
_HEADER: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "task", "records_sha256", "injected_prompt", "start"), _TEXT),
    "budget": (dict,),
    "n_records": (int,),
    "arm": (dict, type(None)),
}
_SUFFIX: Mapping[str, tuple[type, ...]] = {
    "record_id": (int,),
    "record_sha256": _TEXT,
    "suffix": (str, type(None)),
    "loss": (*_NUMBER, type(None)),
    "steps": (int, type(None)),
    "hit": (bool, type(None)),
}
_REQUIRED = ("record_id", "record_sha256", "suffix", *_HEADER)


def _built(path: Path, number: int, kind: Any, value: Any, types: Mapping[str, tuple[type, ...]]) -> Any:
    """Return a dataclass from a line's object; fields that this release does not know are left out."""
    if not isinstance(value, dict):
        raise DttError(f"{path}, line {number} is no JSON object; mend the file.")
    for name, allowed in types.items():
        found = value.get(name)
        wrong = not isinstance(found, allowed) or (isinstance(found, bool) and bool not in allowed)
        if (wrong and name in value) or (name not in value and name in _REQUIRED):
            raise DttError(f"{path}, line {number}: {name!r} is missing or of another kind; mend the file.")
    known = {entry.name for entry in fields(kind)}
    return kind(**{name: item for name, item in value.items() if name in known})


def check_records(path: Path, attacks: AttackFile, records: Sequence[Record], *, task: str, injected: str) -> None:
    """Check that the suffixes were made for this benchmark's records and rule.

    Raises:
        DttError: another benchmark, record or injected prompt; names the first difference.
    """
    if attacks.task != task:
        raise DttError(f"{path} holds attacks on {attacks.task}, not on {task}; evaluate them with that task.")
    if attacks.injected_prompt != injected:
        raise DttError(
            f"{path} injects {attacks.injected_prompt!r} and {task} scores {injected!r}; attack this task instead."
        )
    for suffix in attacks.suffixes:
        known = suffix.record_id < len(records)
        if not known or record_digest(records[suffix.record_id]) != suffix.record_sha256:
            raise DttError(
                f"{path}: its record {suffix.record_id} is not {task}'s ({len(records)} records); attack the data"
                " that are to be evaluated."
            )


def covered(suffixes: Iterable[Suffix]) -> dict[int, str]:
    """Return the texts by record, of those records that have one."""
    return {suffix.record_id: suffix.suffix for suffix in suffixes if suffix.suffix is not None}
