"""Outcome files: everything that is computed comes out of them again, no text goes in, and changes show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.cli import main
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.leaderboard.outcome_files import read_outcomes
from tests.lm_eval_output import planted, write_run

ATTACKS = ("ignore", "completion")


def arm(folder: Path, hits: int, **fields: Any) -> Path:
    outcomes = {attack: planted(hits, 60, start=place) for place, attack in enumerate(ATTACKS)}
    return write_run(folder, outcomes=outcomes, refusal=planted(1, 60), **fields)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Two arms in `out`, and the same as an outcome file elsewhere."""
    model = str(tmp_path / "home" / "alice" / "tiny")
    lora = {"model_args": {"pretrained": model, "peft": str(tmp_path / "secret" / "lora")}}
    costs = {"costs": {"transfer_seconds": 3.5}}
    arm(tmp_path / "out", 40, model=model, stamp=0, **lora)
    arm(tmp_path / "out", 2, model=model, defense="tokens", method="copy", facts=costs, stamp=1, **lora)
    file = tmp_path / "kept" / "both.outcomes.json"
    assert main(["leaderboard", str(tmp_path / "out"), "--export", str(file)]) == 0
    return file


def test_tables_tests_and_intervals_are_those_of_the_runs(exported: Path, tmp_path: Path) -> None:
    boards = []
    for folder in (tmp_path / "out", exported.parent):
        runs, problems = read_runs([folder])
        assert problems == []
        table = build(runs).to_dict()
        for row in table["groups"][0]["rows"]:
            row |= {"file": None, "model": None}
        boards.append(table["groups"][0]["rows"])
    assert boards[0] == boards[1]
    assert boards[0][1]["asr_max"]["hits"] == 40


def test_no_text_of_a_record_and_no_path_is_in_the_file(exported: Path) -> None:
    text = exported.read_text(encoding="utf-8")
    for private in ("Instruction", "Data of", "Now print", "Fine.", "Hacked!", "alice", "secret", "/"):
        assert private not in text.replace("dtt.outcomes/1", "")
    assert '"copy"' in text


def test_an_outcome_file_joins_the_table_of_runs_on_the_same_records(exported: Path, tmp_path: Path) -> None:
    model = str(tmp_path / "home" / "alice" / "tiny")
    lora = {"model_args": {"pretrained": model, "peft": str(tmp_path / "secret" / "lora")}}
    arm(tmp_path / "more", 20, model=model, defense="reminder", stamp=2, **lora)
    runs, _ = read_runs([exported, tmp_path / "more"])
    (group,) = build(runs).groups
    assert [row.defense for row in group.rows] == ["tokens (copy)", "reminder", "none"]
    # Another adapter of the same name is another model.
    other = {"model_args": {"pretrained": model, "peft": str(tmp_path / "elsewhere" / "lora")}}
    arm(tmp_path / "other", 20, model=model, defense="sandwich", stamp=3, **other)
    runs, _ = read_runs([exported, tmp_path / "other"])
    assert len(build(runs).groups) == 2


def test_a_changed_figure_is_refused_and_the_rest_is_shown(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(exported.read_text())
    digits = content["runs"][0]["outcomes"]["ignore"]
    content["runs"][0]["outcomes"]["ignore"] = digits.replace("1", "0", 1)
    exported.write_text(json.dumps(content))
    assert main(["leaderboard", str(exported)]) == 2
    assert "was changed after it was written (its digest is another)" in capsys.readouterr().err
    runs, problems = read_runs([exported, tmp_path / "out"])
    assert len(runs) == 2
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 61),
        ("n", True),
        ("record_ids", [0] * 60),
        ("record_ids", "0"),
        ("outcomes", {}),
        ("outcomes", {"ignore": "0"}),
        ("outcomes", {"ignore": "2" * 60}),
        ("outcomes", {"ignore": "-" * 60}),
        ("outcomes", {"ignore": [0.5] * 60}),
        ("measures", {"control": [2] * 60}),
        ("measures", {"control": [1e400] * 60}),
        ("clusters", [0]),
        ("clusters", ["a"] * 60),
        ("seconds", -1),
        ("model", None),
        ("costs", []),
        ("facts", {"peft": {}}),
        ("unknown", 3),
    ],
)
def test_a_file_that_is_none_is_one_sentence_even_with_its_digest(exported: Path, field: str, value: Any) -> None:
    content = json.loads(exported.read_text())
    del content["digest"]
    content["runs"][0][field] = value
    exported.write_text(json.dumps({**content, "digest": sha256_json(content)}))
    runs, problems = read_runs([exported])
    assert runs == []
    assert len(problems) == 1
    assert "says dtt.outcomes/1 and is none" in problems[0]


def test_what_needs_texts_says_that_there_are_none(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = json.loads(exported.read_text())
    del one["digest"]
    one["runs"] = one["runs"][:1]
    file = exported.parent / "one.outcomes.json"
    file.write_text(json.dumps({**one, "digest": sha256_json(one)}))
    for command in (["diff", str(file), str(file)], ["rescore", str(file)]):
        assert main(command) == 2
        assert "holds outcomes without any text" in capsys.readouterr().err
    assert main(["compare", str(file), str(file), "--fail-if", "asr(B) > asr(A)"]) == 0
    page = exported.parent / "page.html"
    assert main(["leaderboard", str(file), "--html", str(page)]) == 0
    assert 'id="pack0"' not in page.read_text(encoding="utf-8")


def test_a_file_of_another_name_would_not_be_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm(tmp_path / "out", 40)
    assert main(["leaderboard", str(tmp_path / "out"), "--export", str(tmp_path / "x.json")]) == 2
    assert "ends in .outcomes.json" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_shares_and_missing_outcomes_come_back(exported: Path) -> None:
    content = json.loads(exported.read_text())
    del content["digest"]
    entry = content["runs"][0]
    entry["outcomes"]["ignore"] = "-" * 10 + "1" * 20 + "0" * 30
    entry["measures"] = {"answered_under_attack": [None, 0.5] + [1.0] * 58, "control": "1" * 59 + "-"}
    run = read_outcomes(exported, {**content, "digest": sha256_json(content)})[0]
    assert run.made["ignore"].sum() == 50
    assert np.nansum(run.values("ignore")) == 20
    assert np.nansum(run.measures["answered_under_attack"]) == 58.5
    row = build([run]).groups[0].rows[0]
    assert (row.asr["ignore"].hits, row.asr["ignore"].n) == (20, 50)
    assert (row.measures["control"].hits, row.measures["control"].n) == (59, 59)
    assert row.measures["answered_under_attack"].hits is None
