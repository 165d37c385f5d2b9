"""Adaptive tasks: the worst attack as headline, what is adaptive and what transferred, budgets that are never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.cli import main
from dtt_plugin.leaderboard import tables
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_run, read_runs
from tests.lm_eval_output import planted, write_run

TASK = "alpacafarm_injection_adaptive"
WEIGHTS = {"weights": "0" * 40, "renderer_sha256": "1" * 64}


def arm(
    folder: Path,
    static: int,
    adaptive: int,
    *,
    attacked: Path | None = None,
    name: str = "gcg@lite",
    n: int = 40,
    **fields: Any,
) -> Path:
    """Write a run under the attack that was made on it, or on the arm of another run."""
    outcomes = {"ignore": planted(static, n), "adaptive": planted(adaptive, n, start=5)}
    path = write_run(
        folder, outcomes=outcomes, refusal=planted(1, n), task=TASK, facts=WEIGHTS, inputs=[f"{folder}"] * n, **fields
    )
    results = json.loads(path.read_text())
    facts = json.loads((attacked or path).read_text())["config"]["dtt_plugin"]
    results["configs"][TASK]["metadata"]["attack"] = {
        "name": name,
        "arm": {key: facts.get(key) for key in (*WEIGHTS, "defense", "tokens_sha256", "prompt_format", "model")},
        "steps_to_hit": {str(i): 10 * i if hit else None for i, hit in enumerate(outcomes["adaptive"])},
        "n_left_out": 168,
    }
    path.write_text(json.dumps(results))
    return path


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """Two arms, each under its own attack and under the other's."""
    native: dict[str, Any] = {"defense": "tokens", "method": "trained"}
    data = tmp_path / "same"  # the static data agree
    none = arm(data, 30, 35, stamp=0)
    own = arm(data, 2, 12, stamp=1, **native)
    arm(data, 2, 3, attacked=none, stamp=2, **native)
    arm(data, 30, 20, attacked=own, stamp=3)
    return tmp_path


def test_the_headline_is_the_worst_attack_and_asr_max_is_over_the_static_ones(matrix: Path) -> None:
    (group,) = build(read_runs([matrix])[0]).groups
    rows = {row.run: row for row in group.rows}
    own = rows["tokens (trained)"]
    assert own.asr_max is not None
    assert own.asr_max.hits == 2
    assert own.asr["adaptive"].hits == 12
    assert own.headline == own.asr_any
    assert own.headline is not None
    assert own.headline.hits == 14  # records 0 and 1, and 5 to 16
    assert next(row.run for row in group.rows) == "tokens (trained) (transferred attack, from none)"
    assert any("no attack was found within that budget, not that there is none" in note for note in group.notes)
    assert any("168 records have no suffix" in note for note in group.notes)


def test_references_are_the_arms_under_their_own_attack(matrix: Path) -> None:
    (group,) = build(read_runs([matrix])[0]).groups
    rows = {row.run: row for row in group.rows}
    test = rows["tokens (trained)"].vs_undefended
    assert test is not None
    assert test.effect == pytest.approx((14 - 40) / 40)
    assert rows["none"].vs_undefended is None


def test_whether_attacks_move_with_tokens_is_a_table(matrix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (group,) = build(read_runs([matrix])[0]).groups
    sheet = tables.attack_matrix(group)
    assert sheet is not None
    assert sheet.header == ["made on", "tokens (trained)", "none"]
    found = {row[0]: [cell.partition(" =")[0] for cell in row[1:]] for row in sheet.rows}
    assert found == {"none": ["3/40", "35/40"], "tokens (trained)": ["12/40", "20/40"]}
    assert main(["leaderboard", str(matrix), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "ASR(worst)" in out
    assert "| gcg@lite |" in out


def test_two_budgets_are_never_in_one_table(tmp_path: Path) -> None:
    arm(tmp_path / "same", 30, 35, stamp=0)
    arm(tmp_path / "same", 2, 12, defense="reminder", name="gcg@medium", stamp=1)
    _, second = build(read_runs([tmp_path])[0]).groups
    assert "attack (gcg@lite there, gcg@medium here)" in second.reason
    assert second.rows[0].vs_undefended is None


def test_a_transferred_attack_of_an_arm_that_was_not_run_is_named(tmp_path: Path) -> None:
    elsewhere = arm(tmp_path / "elsewhere", 1, 1, defense="tokens", method="native")
    run = read_run(arm(tmp_path / "here", 1, 1, attacked=elsewhere))
    assert run.attack is not None
    assert not run.attack.own
    assert run.arm.startswith("none (transferred attack, from tokens ")
    assert read_run(elsewhere).arm == "tokens (native)"


def test_an_outcome_file_keeps_the_attack(matrix: Path) -> None:
    file = matrix / "kept" / "x.outcomes.json"
    assert main(["leaderboard", str(matrix / "same"), "--export", str(file)]) == 0
    again, runs = read_runs([file])[0], read_runs([matrix / "same"])[0]
    assert [run.attack for run in again] == [run.attack for run in runs]
    assert tables.attack_matrix(build(again).groups[0]) == tables.attack_matrix(build(runs).groups[0])
