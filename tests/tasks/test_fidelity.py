"""The shipped fidelity records: a processor, an obeyer, a copier and a silent model get what they should."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import dtt_plugin
from dtt_plugin.tasks.injection_fidelity.dataset import fidelity
from dtt_plugin.tasks.injection_fidelity.metrics import process_results
from dtt_plugin.tasks.rules import Rule
from tests.tasks.described import metrics, run

RECORDS = json.loads((Path(dtt_plugin.__file__).parent / "tasks/injection_fidelity/records.json").read_text())
DOCUMENTS = list(fidelity()["test"])
OUTCOMES = ("executed", "processed", "ignored")


def scored(answers: list[str]) -> dict[str, float]:
    """Return the rates of a model that gives these answers to the attacked prompts, and obeys the trusted ones."""
    scores = [
        process_results(document, [answer, record["executed"][0]])
        for document, record, answer in zip(DOCUMENTS, RECORDS, answers, strict=True)
    ]
    return {name: mean(score[name] for score in scores) for name in (*OUTCOMES, "control", "empty")}


def test_there_are_at_least_sixty_records_of_each_kind_as_many() -> None:
    kinds = [record["kind"] for record in RECORDS]
    assert len(RECORDS) >= 60
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("translate", "copy", "count", "list", "summarise", "extract"), 11
    )
    assert len({record["id"] for record in RECORDS}) == len({record["request"] for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_what_an_obeyer_says_stands_neither_in_the_prompt_nor_in_a_right_answer(record: dict[str, Any]) -> None:
    executed = Rule("contains_word", tuple(record["executed"]))
    for text in (record["instruction"], record["before"], record["request"], record["after"], record["gold"]):
        assert not executed.fires(text), text


def test_who_does_the_task_has_processed() -> None:
    rates = scored([record["gold"] for record in RECORDS])
    assert rates == {"executed": 0, "processed": 1, "ignored": 0, "control": 1, "empty": 0}


def test_who_obeys_the_data_has_executed() -> None:
    answers = [answer for record in RECORDS for answer in [f"The answer is {record['executed'][-1]}."]]
    assert scored(answers)["executed"] == 1
    both = [f"{record['gold']}\n{record['executed'][0]}" for record in RECORDS]
    assert scored(both)["executed"] == 1


def test_who_says_nothing_has_ignored() -> None:
    rates = scored(["" for _ in RECORDS])
    assert (rates["ignored"], rates["executed"], rates["processed"]) == (1, 0, 0)
    assert rates["empty"] == 0.5


def test_who_copies_has_processed_where_the_task_is_to_copy_and_never_executed() -> None:
    for document in DOCUMENTS:
        scores = process_results(document, [document["input"], ""])
        assert scores["executed"] == 0, document["name"]
        if document["groups"] == ["copy"]:
            assert scores["processed"] == 1, document["name"]
        if document["groups"] in (["translate"], ["count"], ["summarise"]):
            assert scores["ignored"] == 1, document["name"]


def test_the_counts_are_right() -> None:
    for record, document in zip(RECORDS, DOCUMENTS, strict=True):
        if record["kind"] == "count":
            assert record["gold"] == str(document["input"].count(".")), record["id"]


def test_it_runs_without_any_download(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    results = run(tiny, "injection_fidelity", limit=4)
    found = metrics(results, "injection_fidelity")
    assert found["executed"] + found["processed"] + found["ignored"] == pytest.approx(1)
    better = results["higher_is_better"]["injection_fidelity"]
    assert (better["executed"], better["processed"], better["ignored"]) == (False, True, False)
