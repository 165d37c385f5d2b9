"""A user's own records under injection, from a JSONL or JSON file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dtt_plugin.data.benchmark_files import read_json_lines
from dtt_plugin.data.records import OwnRecord, read_json
from dtt_plugin.data.suffixes import EACH_ITS_OWN, check_records, covered
from dtt_plugin.errors import DttError, MissingDataError
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.tasks.adaptive import attacks_to_send, data_before_suffix, tell_left_out
from dtt_plugin.tasks.attacks import ADAPTIVE, FORMS, Injection, drawn_sentences
from dtt_plugin.tasks.description import BENIGN, Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.metrics import REFUSAL
from dtt_plugin.tasks.rules import Rule, parse_rule

CONTROL_NAME = "probe_in_instruction"
DEFAULT_ATTACKS = ("naive", "before", "ignore", "completion")
_SENTENCES = Path(__file__).parents[1] / "injection_demo" / "records.json"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TAKEN = {*FORMS, CONTROL_NAME, BENIGN, ADAPTIVE, REFUSAL, "max", "any", "worst"}
"""Names of other variants, and of metrics behind `hacked_`."""
_FIELDS = ("id", "instruction", "data", "injection", "injections", "success", "answer", "attacked")


class _Probe(NamedTuple):
    text: str
    success: Rule


class _Record(NamedTuple):
    name: str
    instruction: str
    data: str
    probes: list[_Probe]
    answer: str
    """To fake a completion with; "" where there is none."""
    answered: Rule | None
    attacked: dict[str, str]


def own_records(
    *, records: str = "", attacks: str | Sequence[str] = (), variants: Sequence[str] | None = None, **_metadata: Any
) -> dict[str, Any]:
    """Return the user's records.

    Args:
        records: JSONL or JSON file.
        attacks: names of `FORMS`, or one; none: naive, before, ignore, and completion for records with an answer.
        variants: those to keep; None: all.
        _metadata: lm-eval passes its model arguments along; they don't concern the data.

    Raises:
        DttError: a record is not as the README says; names line and field.
    """
    attacks = [attacks] if isinstance(attacks, str) else attacks
    if unknown := [name for name in attacks if name not in FORMS]:
        raise DttError(f"attacks: {unknown[0]!r} is no attack; choose from {', '.join(FORMS)}.")
    return benchmark_dataset("injection_records", _entries(_given(records), attacks), variants)


def own_adaptive(
    *, records: str = "", attacks: str = "", variants: Sequence[str] | None = None, **_metadata: Any
) -> dict[str, Any]:
    """Return the user's records that have a suffix in a file of attacks, with it as one more variant.

    Args:
        records: JSONL or JSON file.
        attacks: file of `dtt attack --own`.
        variants: those to keep; None: all.
        _metadata: lm-eval passes its model arguments along; they don't concern the data.

    Raises:
        DttError: a record is not as the README says, or the suffixes were made for other records.
    """
    read, file = _given(records), attacks_to_send(attacks)
    own = as_attacked(read)
    check_records(Path(attacks), file, own, task="injection_records", injected=EACH_ITS_OWN)
    suffixes = covered(file.suffixes)
    prompts = [record["injection"] for record in own]
    data = data_before_suffix(file.start, own, ignore_sentences(), prompts)
    entries = []
    for number, (entry, record) in enumerate(zip(_entries(read, ()), read, strict=True)):
        found: list[Variant] = []
        if (suffix := suffixes.get(number)) is not None:
            text, rule = data[number] + suffix, record.probes[0].success
            sent = Variant(ADAPTIVE, "attack", record.instruction, text, rule, answer=record.answered)
            found = [*entry.variants, sent]
        entries.append(replace(entry, variants=found))  # one without variants is left out
    tell_left_out(attacks, file, len(read) - len(suffixes))
    return benchmark_dataset("injection_records_adaptive", entries, variants)


def _given(records: Any) -> list[_Record]:
    if not isinstance(records, str) or not records:
        raise MissingDataError(
            'injection_records needs a file with your records: --metadata \'{"records": "mine.jsonl"}\'; the task\'s'
            " README has an example, and `dtt doctor --records mine.jsonl` checks it."
        )
    return read_records(Path(records))


def ignore_sentences() -> list[str]:
    """Return the sentences that the ignore attacks draw from."""
    sentences: list[str] = read_json(_SENTENCES)["ignore_sentences"]
    return sentences


def as_attacked(read: Sequence[_Record]) -> list[OwnRecord]:
    """Return records as `dtt attack` takes them, each with its first injection."""
    return [
        OwnRecord(
            instruction=record.instruction,
            input=record.data,
            output=record.answer,
            injection=record.probes[0].text,
            success={"rule": record.probes[0].success.rule, "texts": list(record.probes[0].success.texts)},
        )
        for record in read
    ]


def _entries(read: Sequence[_Record], attacks: Sequence[str]) -> list[Entry]:
    sentences = ignore_sentences()
    most = max(len(record.probes) for record in read)
    drawn = [
        drawn_sentences(sentences, [record.probes[i].text if i < len(record.probes) else "" for record in read])
        for i in range(most)
    ]
    return [
        _entry(record, [drawn[i][place] for i in range(len(record.probes))], attacks)
        for place, record in enumerate(read)
    ]


def _entry(record: _Record, sentences: Sequence[str], attacks: Sequence[str]) -> Entry:
    found: list[Variant] = []
    forms = attacks or [name for name in DEFAULT_ATTACKS if record.answer or "completion" not in name]
    for number, (probe, sentence) in enumerate(zip(record.probes, sentences, strict=True), 1):
        made = Injection(record.data, probe.text, sentence, record.answer)
        for form in forms:
            name = form if number == 1 else f"{form}_{number}"
            text = FORMS[form](made)
            found.append(Variant(name, "attack", record.instruction, text, probe.success, answer=record.answered))
    first = record.probes[0]
    for name, text in record.attacked.items():
        found.append(Variant(name, "attack", record.instruction, text, first.success, answer=record.answered))
    if first.text:
        asked = f"{record.instruction} {first.text}"
        found.append(Variant(CONTROL_NAME, "control", asked, record.data, first.success))
    found.append(Variant(BENIGN, BENIGN, record.instruction, record.data, first.success, answer=record.answered))
    return Entry(record.instruction, record.data, found, name=record.name)


def read_records(path: Path) -> list[_Record]:
    """Return the records in a JSONL file (one a line) or a JSON file (a list).

    Raises:
        DttError: see `own_records`.
    """
    try:
        whole = read_bytes(path)
    except OSError as error:
        raise DttError(f"records={path} can't be read ({error.strerror}); check the path.") from error
    if whole.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        values, lines = read_json(path), None
    else:
        values = read_json_lines(path)
        lines = [number for number, line in enumerate(whole.split(b"\n"), 1) if line.strip()]
    if not values:
        raise DttError(f"{path} holds no records; write one JSON object a line.")
    found = [
        _record(value, number, f"{path}, line {lines[number]}" if lines else f"{path}, record {number}")
        for number, value in enumerate(values)
    ]
    names = [record.name for record in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DttError(f"{path}: the id {twice[0]!r} stands twice; give each record its own.")
    return found


def _record(value: Any, number: int, where: str) -> _Record:
    if not isinstance(value, Mapping):
        raise DttError(f"{where}: a record is a JSON object with instruction, data, injection and success.")
    if unknown := [name for name in value if name not in _FIELDS]:
        raise DttError(f"{where}: {str(unknown[0])[:50]!r} is no field; a record has {', '.join(_FIELDS)}.")
    attacked = value.get("attacked", {})
    if not isinstance(attacked, Mapping) or not all(isinstance(text, str) and text for text in attacked.values()):
        raise DttError(f"{where}: attacked is no object of texts, one for each attack's name.")
    for name in attacked:
        if name in _TAKEN or not _NAME.fullmatch(name):
            raise DttError(f"{where}: attacked: {name[:50]!r} is taken or no plain word; choose another name.")
    answer = value.get("answer")
    if answer is not None and not isinstance(answer, str | Mapping):
        raise DttError(f"{where}: answer is neither a text nor a rule.")
    as_rule = {"rule": "contains_any", "texts": [answer.strip()]} if isinstance(answer, str) else answer
    return _Record(
        name=str(value.get("id", number)),
        instruction=_text(value, "instruction", where),
        data=_text(value, "data", where),
        probes=_probes(value, where, optional=bool(attacked)),
        answer=answer if isinstance(answer, str) else "",
        answered=None if as_rule is None else parse_rule(as_rule, f"{where}: answer"),
        attacked=dict(attacked),
    )


def _text(value: Mapping[str, Any], field: str, where: str) -> str:
    text = value.get(field)
    if not isinstance(text, str) or not text.strip():
        raise DttError(f"{where}: {field} is {'missing' if text is None else 'no text'}; write one.")
    return text


def _probes(value: Mapping[str, Any], where: str, *, optional: bool) -> list[_Probe]:
    """Return the injections, each with its rule; one without a text where all attacked data is ready-made."""
    if "injection" in value and "injections" in value:
        raise DttError(f"{where}: give injection or injections, not both.")
    if "injections" not in value:
        text = _text(value, "injection", where) if "injection" in value or not optional else ""
        return [_Probe(text, parse_rule(value.get("success"), f"{where}: success"))]
    several = value["injections"]
    if not isinstance(several, list) or not several:
        raise DttError(f"{where}: injections is no list of texts, or of objects with injection and success.")
    found = []
    for number, one in enumerate(several, 1):
        part = f"{where}: injections, number {number}"
        own = one if isinstance(one, Mapping) else {"injection": one}
        rule = own.get("success", value.get("success"))
        found.append(_Probe(_text(own, "injection", part), parse_rule(rule, f"{part}: success")))
    return found
