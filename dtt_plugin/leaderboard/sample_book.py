"""The samples of all runs, packed for the report's browser: each text once, compressed, one pack per attack."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.safe_text import printable

# Stand for the data and the instruction in a prompt; `printable` leaves no such character in a text.
DATA_MARK, INSTRUCTION_MARK = "\x01", "\x02"
_BLANK = " \t\r\n"
# What a response is cut to, from not at all on, until the packs fit.
_LENGTHS = (None, 4000, 2000, 1000, 500, 250, 100)
MOST_BYTES = 24_000_000
_Record = tuple[int, str, str, str, str]


@dataclass(frozen=True)
class Book:
    """The packs, and what had to be left out to keep the page small."""

    packs: dict[str, str]
    """Per attack, control or "benign": JSON, deflated (raw), in base64."""
    kinds: dict[str, str]
    """What each of them is."""
    cut_to: int | None
    """The number of characters that responses were cut to; None where all are whole."""


@dataclass(frozen=True)
class _Cell:
    run: int
    hit: bool
    text: str
    template: str


def make_book(runs: Iterable[Run], *, most_bytes: int = MOST_BYTES) -> Book:
    """Pack the samples of `runs`; responses are cut, all to the same length, only where the packs outgrow `most_bytes`.

    A pack is {"records": [[record id, instruction, data before the injection, injection, data behind]],
    "runs": {run: {"record": [...],
    "hit": "0110", "response": [...], "template": [...]}}, "strings": [...]}: texts are places in "strings", and a
    template is the prompt with marks for its data and its instruction.
    """
    attacks: dict[str, dict[_Record, list[_Cell]]] = {}
    kinds: dict[str, str] = {}
    known: dict[str, str] = {}
    for number, run in enumerate(runs):
        for sample in run.responses():
            at, end = sample.injected_at, sample.injected_at + len(sample.injected)
            parts = (sample.data[:at], sample.data[at:end], sample.data[end:])
            instruction, (before, injected, behind) = printable(sample.instruction), map(printable, parts)
            key = (sample.record_id, instruction, before, injected, behind)
            template = _template(printable(sample.prompt), instruction, before + injected + behind)
            text = printable(sample.text)
            # One object per distinct text: hundreds of runs share most of theirs.
            cell = _Cell(number, sample.hit, known.setdefault(text, text), known.setdefault(template, template))
            kinds[printable(sample.attack)] = sample.kind
            attacks.setdefault(printable(sample.attack), {}).setdefault(key, []).append(cell)
    for length in _LENGTHS:
        packs = {attack: _pack(records, length) for attack, records in attacks.items()}
        if sum(map(len, packs.values())) <= most_bytes:
            break
    return Book(packs, kinds, length)


def _template(prompt: str, instruction: str, data: str) -> str:
    """Return the prompt with marks, where the marks can be put back to give the same prompt."""
    template = prompt
    for text, mark in ((data, DATA_MARK), (instruction, INSTRUCTION_MARK)):
        if trimmed := text.strip(_BLANK):
            template = template.replace(trimmed, mark)
    return template


def _pack(records: dict[_Record, list[_Cell]], length: int | None) -> str:
    strings: dict[str, int] = {}

    def place(text: str) -> int:
        return strings.setdefault(text, len(strings))

    runs: dict[int, dict[str, list[Any]]] = {}
    table = []
    # By record, so that the answers of all runs to one prompt, which are alike, lie in deflate's window.
    for number, (key, cells) in enumerate(sorted(records.items())):
        table.append([key[0], *(place(text) for text in key[1:])])
        for cell in cells:
            text = cell.text
            if length is not None and len(text) > length:
                text = f"{text[:length]} [{len(text) - length} more characters are in the run's samples file]"
            run = runs.setdefault(cell.run, {"record": [], "hit": [], "response": [], "template": []})
            run["record"].append(number)
            run["hit"].append("1" if cell.hit else "0")
            run["response"].append(place(text))
            run["template"].append(place(cell.template))
    packed = {number: {**run, "hit": "".join(run["hit"])} for number, run in runs.items()}
    raw = json.dumps({"records": table, "runs": packed, "strings": list(strings)}, ensure_ascii=False).encode()
    compressor = zlib.compressobj(level=4, wbits=-15)
    return base64.b64encode(compressor.compress(raw) + compressor.flush()).decode()
