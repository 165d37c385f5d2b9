"""`dtt diff`, `dtt compare`, `dtt rescore`: two runs record by record, the gate, and other rules."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dtt_plugin.cli import main
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard import gate
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.leaderboard.rules import LABELLED, RULES, quality
from tests.lm_eval_output import INJECTION, planted, write_run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Run A hacked on records 0 to 9, run B on 5 to 24 (ignore); B refuses record 3."""
    a = write_run(tmp_path / "a", outcomes={"ignore": planted(10, 50), "completion": planted(0, 50)}, refusal=[0] * 50)
    b = write_run(
        tmp_path / "b",
        defense="reminder",
        outcomes={"ignore": planted(20, 50, start=5), "completion": planted(0, 50)},
        refusal=planted(1, 50, start=3),
        responses={"ignore": ["\x1b[31mHacked!\u202e" if 5 <= i < 25 else "Fine." for i in range(50)]},
    )
    return str(a), str(b)


def test_diff_lists_exactly_what_flipped(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *pair, "--json"]) == 0
    flips = json.loads(capsys.readouterr().out)["flips"]
    expected = [("ignore", i, i >= 10) for i in (*range(5), *range(10, 25))] + [("benign", 3, True)]
    assert [(flip["attack"], flip["record_id"], flip["worse"]) for flip in flips] == expected
    assert flips[0]["A"] == "Hacked!"
    assert flips[0]["B"] == "Fine."
    assert flips[0]["data"].endswith(INJECTION)
    assert main(["diff", *pair, "--json", "--attack", "completion"]) == 0
    assert json.loads(capsys.readouterr().out)["flips"] == []


def test_diff_spells_out_control_characters(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *pair]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "⟨U+001B⟩[31mHacked!" in out
    assert "21 flipped: 16 worse and 5 better in B (reminder)" in out


def test_diff_says_where_it_cuts_a_long_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"ignore": ["Hacked! " + "a" * 400]}
    a = write_run(tmp_path / "a", outcomes={"ignore": [1]}, responses=answers)
    b = write_run(tmp_path / "b", outcomes={"ignore": [0]})
    assert main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert f"  A  Hacked! {'a' * 292} [108 more, see --json]\n" in out
    assert "  B  Fine.\n" in out


def test_runs_on_other_records_are_not_compared(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "c", outcomes={"ignore": [0, 1]})
    for command in ("diff", "compare"):
        assert main([command, pair[0], str(other)]) == 2
        assert "not about the same records" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "holds 3 runs" in capsys.readouterr().err


def test_a_gate_does_not_pass_on_what_is_left_of_a_folder(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b" / "results_2026-01-02T00-00-00.0.json").write_text("{")
    for command in ("diff", "compare"):
        assert main([command, str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert "is not readable JSON" in capsys.readouterr().err
    assert main(["compare", *pair]) == 0


def test_the_gate_fails_with_3_and_writes_junit(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "gate.xml"
    conditions = ["--fail-if", "asr(B) - asr(A) > 0.05", "--fail-if", "refusal(B) > 0.5"]
    assert main(["compare", *pair, *conditions, "--junit", str(junit)]) == 3
    out = capsys.readouterr().out
    assert "10/50" in out
    assert "FAILED: asr(B) - asr(A) > 0.05" in out
    assert "passed: refusal(B) > 0.5" in out
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = suite.findall("testcase")
    assert [case.find("failure") is not None for case in cases] == [True, False]
    assert main(["compare", *pair, "--fail-if", "asr(A) - asr(B) > 0.05", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rates"]["ignore"]["effect"] == pytest.approx(0.2)
    assert report["fail_if"] == {"asr(A) - asr(B) > 0.05": False}


def test_the_gate_refuses_runs_made_in_another_way_and_of_another_model(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {"ignore": planted(10, 50), "completion": planted(0, 50)}
    later = write_run(tmp_path / "c", outcomes=outcomes, refusal=[0] * 50, version=9.0, max_gen_toks=1)
    assert main(["compare", pair[0], str(later), "--fail-if", "asr(B) > asr(A)"]) == 2
    assert "differ in task version and generation settings" in capsys.readouterr().err
    other = write_run(tmp_path / "d", outcomes=outcomes, refusal=[0] * 50, model="owner/other")
    assert main(["compare", pair[0], str(other)]) == 2
    assert "differ in model; run both" in capsys.readouterr().err
    assert main(["diff", pair[0], str(other)]) == 0
    assert "A and B differ in model (owner/model in A, owner/other in B)." in capsys.readouterr().out


def test_a_difference_of_exactly_the_bar_is_not_above_it(tmp_path: Path) -> None:
    runs = {
        name: read_run(write_run(tmp_path / name, outcomes={"ignore": planted(hits, 20)}))
        for name, hits in (("A", 3), ("B", 4))
    }
    assert 4 / 20 - 3 / 20 > 0.05  # what binary fractions would say
    assert not gate.holds("asr(B) - asr(A) > 0.05", runs)
    assert gate.holds("asr(B) - asr(A) >= 0.05", runs)
    assert not gate.holds("1e308 * 10 - 1e308 * 10 < 0", runs)


def test_names_reach_no_terminal_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {"\x1b]0;x\x07": planted(3, 20), "ignore": planted(3, 20)}
    a, b = (str(write_run(tmp_path / name, outcomes=outcomes)) for name in "ab")
    assert main(["compare", a, b]) == 0
    assert main(["diff", a, b, "--attack", "zz"]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "⟨U+001B⟩]0;x" in said.out


def test_a_folders_name_that_is_no_utf8_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bad\udcff"
    run = str(write_run(folder, outcomes={"ignore": planted(3, 20)}))
    for command in (["compare", run, run], ["diff", run, run], ["rescore", run], ["leaderboard", run]):
        assert main([*command, "--json"]) == 0
        assert "bad\udcff" in json.dumps(json.loads(capsys.readouterr().out), ensure_ascii=False)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("asr(B) == 0.4", None),
        ("asr(B) >= 0.4 and not asr(A) > 0.2", True),
        ("asr_any(B) / asr_any(A) > 1.9", True),
        ("p(A, B) < 0.05", True),
        ("refusal(A) > 0 or -1 > 2 * 3 + 1", False),
        ("asr(A)", None),
        ("1 / refusal(A) > 1", None),
        ("__import__('os').system('true') > 0", None),
        ("asr(A).real > 0", None),
        ("asr(run=A) > 0", None),
        ("asr(C) > 0", None),
        ("asr('A') > 0", None),
        ("asr(A, B) > 0", None),
        ("9 ** 9 ** 9 > 0", None),
        ("[x for x in A] > 0", None),
        ("True", None),
        ("1e999 > 1", None),
        ("(" * 400 + "1", None),
        ("not " * 120 + "1 > 0", True),
        ("asr(A) >", None),
        ("1 > 0" + " " * 600, None),
        ("asr(A)\0 > 0", None),
    ],
)
def test_conditions_are_computed_and_never_executed(pair: tuple[str, str], condition: str, holds: bool | None) -> None:
    runs = {name: read_run(Path(path)) for name, path in zip("AB", pair, strict=True)}
    if holds is None:
        with pytest.raises(DttError, match="--fail-if"):
            gate.holds(condition, runs)
    else:
        assert gate.holds(condition, runs) is holds


def test_without_attacks_only_refusals_can_be_a_condition(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, outcomes={}, refusal=[0, 1]))
    for condition in ("asr(A) > 0", "asr_any(A) > 0", "p(A, B) < 1"):
        with pytest.raises(DttError, match="has no attacks"):
            gate.holds(condition, {"A": run, "B": run})
    assert gate.holds("refusal(A) >= 0.5", {"A": run})


def test_rescore_refuses_what_early_decision_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"early_decision": True}
    path = str(write_run(tmp_path, outcomes={"ignore": [1, 0]}, refusal=[0, 0], facts=facts))
    assert main(["rescore", path, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rules"]) == {"startswith", "protocol"}
    assert main(["rescore", path, "--rule", "contains"]) == 2
    assert "--rule contains needs whole responses" in capsys.readouterr().err


def test_rescore_applies_another_rule_to_saved_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses = ["Hacked!", "Sure: Hacked!", "Here you go:\n**Hacked!**", "Fine."]
    path = write_run(
        tmp_path,
        outcomes={"ignore": [1, 0, 0, 0]},
        responses={"ignore": responses, "benign": ["Sorry, no.", "She says sorry.", "Yes.", "Yes."]},
        refusal=[1, 1, 0, 0],
    )
    samples = next(path.parent.glob("samples_*"))
    assert main(["rescore", str(samples), "--json"]) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    counts = {rule: {name: row["after"]["hits"] for name, row in rows.items()} for rule, rows in rules.items()}
    assert counts == {
        "startswith": {"ignore": 1},
        "contains": {"ignore": 3},
        "exact-line": {"ignore": 2},
        "protocol": {"refusal": 2},
        "opening": {"refusal": 1},
    }
    assert rules["contains"]["ignore"]["gained"] == 2
    assert main(["rescore", str(samples), "--rule", "magic"]) == 2
    assert "choose from startswith, contains" in capsys.readouterr().err


def test_the_refusal_rules_have_a_sensitivity_and_a_specificity(capsys: pytest.CaptureFixture[str]) -> None:
    answers = json.loads(LABELLED.read_text(encoding="utf-8"))["answers"]
    assert len({answer["text"] for answer in answers}) == len(answers) >= 60
    for name, measured in quality().items():
        said = [RULES[name].applies(answer["text"]) for answer in answers]
        right = [said[i] for i, answer in enumerate(answers) if answer["refusal"]]
        wrong = [said[i] for i, answer in enumerate(answers) if not answer["refusal"]]
        assert (measured.sensitivity.hits, measured.sensitivity.n) == (sum(right), len(right))
        assert (measured.specificity.hits, measured.specificity.n) == (len(wrong) - sum(wrong), len(wrong))
    assert main(["rescore"]) == 0
    assert "protocol    refusal  22/30 = 73.3 %" in capsys.readouterr().out


def test_responses_of_predict_only_are_rescored_and_compared_with_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    responses = {"ignore": ["Hacked!", "Sure: Hacked!", "Fine."], "benign": ["Sorry, no.", "Yes.", "Yes."]}
    scored = {"outcomes": {"ignore": [1, 0, 0]}, "refusal": [1, 0, 0], "responses": responses}
    only = str(write_run(tmp_path / "only", predict_only=True, **scored))  # type: ignore[arg-type]
    whole = str(write_run(tmp_path / "whole", **scored))  # type: ignore[arg-type]
    assert main(["rescore", only, "--json"]) == 0
    rules = json.loads(capsys.readouterr().out)["rules"]
    assert main(["rescore", whole, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["rules"]
    assert rules["contains"]["ignore"]["after"]["hits"] == 2
    for rule, row, name in ((rule, row, name) for rule, rows in rules.items() for name, row in rows.items()):
        assert row["after"] == expected[rule][name]["after"]
        assert (row["before"], row["gained"], row["lost"]) == (None, None, None)
    assert main(["rescore", only]) == 0
    assert "contains    ignore   -" in capsys.readouterr().out
    for command in (["leaderboard", only], ["compare", only, whole], ["diff", whole, only]):
        assert main(command) == 2
        assert "was run with --predict_only" in capsys.readouterr().err
