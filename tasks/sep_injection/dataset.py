"""SEP's records: a probe with a known answer, once in the data and once in the instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.data.records import SENTENCES_FILE, data_file, load_sentences, read_json
from dtt_plugin.data.sources import SEP_892_FILE, SEP_FILE
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.attacks import FORMS, Injection, drawn_sentences
from dtt_plugin.tasks.description import BENIGN, Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.rules import Rule

_FILES = {"sep_injection": SEP_FILE, "sep_injection_892": SEP_892_FILE}
_TEXTS = ("system_prompt_clean", "prompt_clean", "system_prompt_instructed", "prompt_instructed", "witness")


def sep(
    *,
    task: str,
    variants: Sequence[str] | None = None,
    answers: str | None = None,
    allow_modified_data: bool = False,
    **_metadata: Any,
) -> dict[str, Any]:
    """Return SEP's records.

    Args:
        task: which set.
        variants: those to keep; None: all.
        answers: a JSON list with an answer to each clean record, in order: with it the fake completion is tried too.
        allow_modified_data: accept data that is not SEP's.
        _metadata: lm-eval passes its model arguments along; they don't concern the data.
    """
    records = load_benchmark(_FILES[task], allow_modified=allow_modified_data)
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in _TEXTS):
            raise DttError(f"{_FILES[task]}: record {number} lacks a text in one of {', '.join(_TEXTS)}.")
    probes = [_probe(record, number) for number, record in enumerate(records)]
    sentences = load_sentences(data_file(SENTENCES_FILE), allow_modified=allow_modified_data).test
    drawn = drawn_sentences(sentences, probes)
    fake = _answers(answers, len(records))
    return benchmark_dataset(
        task,
        [
            _entry(
                record, Injection(record["prompt_clean"], probe, sentence, answer or ""), with_completion=bool(answer)
            )
            for record, probe, sentence, answer in zip(records, probes, drawn, fake, strict=True)
        ],
        variants,
    )


def _entry(record: Mapping[str, Any], made: Injection, *, with_completion: bool) -> Entry:
    instruction, data = record["system_prompt_clean"], record["prompt_clean"]
    witness = (record["witness"].strip(),)
    rules: dict[str, Any] = {"rule": Rule("contains_word", witness), "others": (Rule("contains_any", witness),)}
    attacks = {
        "as_published": record["prompt_instructed"],
        "end": FORMS["naive"](made),
        "ignore_end": FORMS["ignore"](made),
    }
    if with_completion:
        attacks["completion_end"] = FORMS["completion"](made)
    return Entry(
        instruction,
        data,
        [
            *(Variant(name, "attack", instruction, text, **rules) for name, text in attacks.items()),
            Variant("probe_in_instruction", "control", record["system_prompt_instructed"], data, **rules),
            Variant(BENIGN, BENIGN, instruction, data, **rules),
        ],
        cluster=record["witness"],
    )


def _probe(record: Mapping[str, Any], number: int) -> str:
    """Return what was put into the data, which stands at one of its ends.

    A space of its joint stays on it when it is cut out; a probe with one at its end would be found by no defense that
    looks for the data as a template trims it.
    """
    clean, instructed = record["prompt_clean"].strip(), record["prompt_instructed"]
    probe = instructed.replace(clean, "", 1).strip() if clean in instructed else ""
    if not probe:
        raise DttError(f"SEP's record {number} has no probe beside its data; fetch the file again.")
    return str(probe)


def _answers(path: str | None, n: int) -> list[str | None]:
    if path is None:
        return [None] * n
    answers = read_json(Path(path))
    if not isinstance(answers, list) or len(answers) != n or not all(isinstance(text, str) for text in answers):
        raise DttError(f"answers={path} is no JSON list of {n} texts, one for each record of SEP; correct the file.")
    return list(answers)
