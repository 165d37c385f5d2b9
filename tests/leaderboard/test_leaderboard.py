"""`dtt leaderboard`: what is compared with what, what is said about it, and in which form."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.cli import main
from dtt_plugin.costs import recorded_costs
from dtt_plugin.leaderboard import published, sheets, tables, wording
from dtt_plugin.leaderboard.board import Leaderboard
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.public_names import public_name
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens
from tests.lm_eval_output import planted, write_run

ATTACKS = ("ignore", "completion", "ignore_completion")
LLAMA_3 = "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA_3_1 = "meta-llama/Llama-3.1-8B-Instruct"


def arm(folder: Path, *hits: int, n: int = 208, refusals: int = 1, **fields: Any) -> Path:
    """Write a run with so many hits per attack (one number: the same for all)."""
    counts = hits if len(hits) == 3 else hits * 3
    outcomes = {attack: planted(count, n) for attack, count in zip(ATTACKS, counts, strict=True)}
    return write_run(folder, outcomes=outcomes, refusal=planted(refusals, n), **fields)


def compared(*paths: Path, **options: Any) -> Leaderboard:
    runs, problems = read_runs(paths)
    return build(runs, problems=problems, **options)


def board(*paths: Path, **options: Any) -> dict[str, Any]:
    return compared(*paths, **options).to_dict()


def rows(table: dict[str, Any], group: int = 0) -> dict[str, Any]:
    return {row["run"]: row for row in table["groups"][group]["rows"]}


def four_arms(folder: Path, model: str = LLAMA_3) -> Path:
    """The seed experiment's counts for Llama 3."""
    costs = {"align_seconds": 217.0, "transfer_seconds": 0.002, "bake_seconds": 75.1, "peak_memory_mb": 12300}
    arm(folder, 60, 107, 90, model=model, refusals=4, stamp=0)
    arm(folder, 30, 72, 50, model=model, refusals=2, defense="reminder", stamp=1)
    arm(folder, 90, 118, 100, model=model, refusals=3, defense="sandwich", stamp=2)
    arm(folder, 3, 8, 3, model=model, defense="tokens", method="native", stamp=3)
    arm(folder, 0, model=model, defense="tokens", method="procrustes", facts={"costs": costs}, stamp=4)
    return folder


def test_the_seed_experiments_table_comes_out_of_its_counts(tmp_path: Path) -> None:
    table = board(four_arms(tmp_path), published=True)
    found = rows(table)
    percents = {name: round(100 * row["asr_max"]["rate"], 1) for name, row in found.items() if not row["published"]}
    assert percents == {
        "none": 51.4,
        "reminder": 34.6,
        "sandwich": 56.7,
        "tokens (native)": 3.8,
        "tokens (procrustes)": 0.0,
    }
    moved = found["tokens (procrustes)"]
    assert round(moved["gap_closed"]["published"]["value"], 2) == 1.01
    assert round(moved["gap_closed"]["measured"]["value"], 2) == 1.08
    assert moved["cost"]["pipeline_s"] == pytest.approx(292.102)
    assert moved["cost"]["speedup"] == pytest.approx(16 * 3600 / 292.102)
    # The order is that of ASR(max), the published rows below.
    assert list(found)[:2] == ["tokens (procrustes)", "tokens (native)"]
    published = found["published: tokens (procrustes)"]
    assert published["cost"]["pipeline_s"] == 294.8
    assert round(published["cost"]["speedup"], 1) == 195.4
    assert (published["vs_undefended"], published["vs_native"]) == (None, None)
    assert table["groups"][0]["tests"] == 4 + 3  # published rows are in no test
    shown = tables.markdown(compared(tmp_path, published=True))
    assert "| published: reminder | - | - | - | 34.6 %" in shown


@pytest.mark.parametrize(
    ("fields", "speedup"),
    [
        ({"model": LLAMA_3}, 16 * 3600 / 300),
        ({"model": "/models/Qwen2.5-7B-Instruct"}, 16 * 3600 / 300),
        ({"model": "owner/model"}, None),
        ({"model": LLAMA_3, "model_args": {"pretrained": LLAMA_3, "peft": "lora"}}, None),
        ({"model": LLAMA_3, "model_args": f"pretrained={LLAMA_3},load_in_4bit=True"}, None),
    ],
)
def test_a_speedup_is_against_what_training_is_known_to_cost_for_this_model(
    tmp_path: Path, fields: dict[str, Any], speedup: float | None
) -> None:
    costs = {"align_seconds": 200.0, "transfer_seconds": 10.0, "bake_seconds": 90.0}
    arm(tmp_path, 100, stamp=0, **fields)
    arm(tmp_path, 0, defense="tokens", method="procrustes", facts={"costs": costs}, stamp=1, **fields)
    found = rows(board(tmp_path))["tokens (procrustes)"]["cost"]
    assert found["pipeline_s"] == 300
    assert found["speedup"] == (speedup and pytest.approx(speedup))


def test_a_measured_cost_of_training_counts_for_its_model_only(tmp_path: Path) -> None:
    arm(tmp_path, 100, stamp=0)
    native = {"costs": {"train_seconds": 6000.0}}
    arm(tmp_path, 0, defense="tokens", method="trained", facts=native, stamp=1)
    moved = {"costs": {"transfer_seconds": 3.0}}
    arm(tmp_path, 0, defense="tokens", method="copy", facts=moved, stamp=2)
    arm(tmp_path, 100, model="owner/other", stamp=3)
    arm(tmp_path, 0, model="owner/other", defense="tokens", method="copy", facts=moved, stamp=4)
    one, other = ({row["defense"]: row["cost"]["speedup"] for row in g["rows"]} for g in board(tmp_path)["groups"])
    assert one == {"none": None, "tokens (trained)": None, "tokens (copy)": 2000.0}
    assert other["tokens (copy)"] is None


@pytest.mark.parametrize("hits", [107, 104, 150])
def test_a_transfer_that_closes_nothing_has_no_speedup(tmp_path: Path, hits: int) -> None:
    costs = {"align_seconds": 10.0, "transfer_seconds": 1.0}
    arm(tmp_path, 107, model=LLAMA_3, stamp=0)
    arm(tmp_path, hits, model=LLAMA_3, defense="tokens", method="procrustes", facts={"costs": costs}, stamp=1)
    table = board(tmp_path)
    assert rows(table)["tokens (procrustes)"]["cost"]["speedup"] is None
    cost = next(sheet for sheet in sheets.sheets(compared(tmp_path)) if sheet.title.endswith("cost"))
    assert "speed-up" not in cost.header
    arm(tmp_path, 107, model=LLAMA_3, defense="reminder", stamp=2)
    assert rows(board(tmp_path))["tokens (procrustes)"]["cost"]["speedup"] is None


def test_a_gap_against_native_tokens_that_a_row_beats_is_marked_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm(tmp_path, 168, stamp=0)
    arm(tmp_path, 36, defense="tokens", method="trained", stamp=1)
    arm(tmp_path, 0, defense="tokens", method="adapted", stamp=2)
    sentence = "these native tokens are themselves worse than a row of this table"
    outputs = {}
    for form in ("terminal", "markdown", "csv", "latex", "json"):
        assert main(["leaderboard", str(tmp_path), "--format", form]) == 0
        outputs[form] = capsys.readouterr().out
        assert sentence in re.sub(r"\s+", " ", outputs[form])
    marked = re.compile(r"1\.273 (?:\\)?\[[\d., ]+(?:\\)?\](?:†|\\dag\{\})")
    for form in ("terminal", "markdown", "latex"):
        assert marked.search(outputs[form]), form
    for line in csv.DictReader(io.StringIO(outputs["csv"])):
        assert line["gap_closed.measured.weak_native"] == ("" if line["defense"] == "none" else "True")
    closed = rows(json.loads(outputs["json"]))["tokens (adapted)"]["gap_closed"]["measured"]
    assert (round(closed["value"], 3), closed["weak_native"]) == (1.273, True)
    report, figures = tmp_path / "report.html", tmp_path / "figures"
    assert main(["leaderboard", str(tmp_path), "--html", str(report), "--figures", str(figures)]) == 0
    assert "1.273†" in report.read_text(encoding="utf-8")
    assert re.search(r"1\.273 \[[^<]*\]†</text>", report.read_text(encoding="utf-8"))
    assert "tokens (adapted) †" in next(figures.glob("gap-closed-*.svg")).read_text(encoding="utf-8")


def test_a_gap_against_native_tokens_that_nothing_beats_is_not_marked(tmp_path: Path) -> None:
    arm(tmp_path, 168, stamp=0)
    arm(tmp_path, 2, defense="tokens", method="trained", stamp=1)
    arm(tmp_path, 0, defense="tokens", method="adapted", stamp=2)
    table = board(tmp_path)
    assert rows(table)["tokens (adapted)"]["gap_closed"]["measured"]["weak_native"] is False
    assert "†" not in tables.markdown(compared(tmp_path)) + tables.latex(compared(tmp_path))


def test_a_gap_against_a_published_figure_that_a_row_beats_is_marked(tmp_path: Path) -> None:
    falcon = "tiiuae/Falcon3-7B-Instruct"
    arm(tmp_path, 176, model=falcon, stamp=0)
    arm(tmp_path, 0, model=falcon, defense="tokens", method="procrustes", stamp=1)
    closed = rows(board(tmp_path))["tokens (procrustes)"]["gap_closed"]["published"]
    assert closed["weak_native"] is True  # 0 of 208, at most 1.8 %, against 4.8 %
    arm(tmp_path, 5, model=falcon, defense="tokens", method="procrustes", stamp=1)
    assert rows(board(tmp_path))["tokens (procrustes)"]["gap_closed"]["published"]["weak_native"] is False


@pytest.mark.parametrize(
    ("model", "percents"),
    [
        (LLAMA_3, [51.4, 34.6, 56.7, 0.5]),
        (LLAMA_3_1, [69.2, 29.8, 60.6, 0.5]),
        ("tiiuae/Falcon3-7B-Instruct", [84.6, 75.0, 70.7, 4.8]),
        ("Qwen/Qwen2.5-7B-Instruct", [93.3, 94.7, 85.6, 1.0]),
    ],
)
def test_the_papers_figures_of_all_four_models_are_there(model: str, percents: list[float]) -> None:
    found = {figure.defense: figure.asr_max for figure in published.figures(model, published.TASK)}
    assert [found[name] for name in ("none", "reminder", "sandwich", "tokens (native), paper")] == percents
    assert published.figures(model, "injection_demo") == ()


def test_the_other_direction_has_the_published_undefended_figure_for_its_ratios(tmp_path: Path) -> None:
    arm(tmp_path, 4, 0, 1, model=LLAMA_3_1, defense="tokens", method="native", stamp=0)
    arm(tmp_path, 42, 70, 62, model=LLAMA_3_1, defense="tokens", method="procrustes", stamp=1)
    closed = rows(board(tmp_path, published=True))["tokens (procrustes)"]["gap_closed"]
    assert closed["undefended"] == "published"
    assert round(closed["published"]["value"], 3) == 0.517
    assert round(closed["measured"]["value"], 3) == 0.528
    alone = rows(board(tmp_path))["tokens (procrustes)"]
    assert alone["gap_closed"] is None
    assert alone["vs_undefended"] is None


def test_tests_are_paired_on_any_attack_and_holm_covers_the_table(tmp_path: Path) -> None:
    arm(tmp_path, 100, 0, 0, stamp=0)
    arm(tmp_path, 99, 0, 0, defense="reminder", stamp=1)
    arm(tmp_path, 0, 40, 0, defense="tokens", method="native", stamp=2)
    found = rows(board(tmp_path))
    near = found["reminder"]["vs_undefended"]
    assert near["effect"] == pytest.approx(-1 / 208)
    assert (near["p"], near["p_holm"], near["told_from_noise"]) == (1.0, 1.0, False)
    far = found["tokens (native)"]["vs_undefended"]
    assert far["effect"] == pytest.approx(-60 / 208)
    assert far["p"] == pytest.approx(2 * 0.5**60)
    assert far["p_holm"] == pytest.approx(3 * far["p"])
    assert wording.NOISE in tables.markdown(compared(tmp_path)).replace("\\", "")


def test_an_undefended_model_that_hardly_obeys_ranks_nothing(tmp_path: Path) -> None:
    arm(tmp_path, 12, stamp=0)
    arm(tmp_path, 0, defense="tokens", method="native", stamp=1)
    group = board(tmp_path)["groups"][0]
    assert (group["discriminating"], group["ranked"]) == (False, False)
    assert "NOT DISCRIMINATING" in group["notes"][0]
    assert "12/208" in group["notes"][0]
    assert all(row["gap_closed"] is None for row in group["rows"])
    assert [row["run"] for row in group["rows"]] == ["none", "tokens (native)"]
    assert board(tmp_path, floor=0.01)["groups"][0]["discriminating"]


def test_two_records_separate_nothing(tmp_path: Path) -> None:
    arm(tmp_path, 2, n=2)
    group = board(tmp_path)["groups"][0]
    assert group["smallest_difference"] is None
    assert not group["discriminating"]


def test_what_discriminates_is_asked_of_what_is_tested(tmp_path: Path) -> None:
    # Each attack works on five records of its own: ASR(max) is 5 of 20, ASR(any), which the tests are about, 15 of 20.
    apart = {attack: planted(5, 20, start=5 * place) for place, attack in enumerate(ATTACKS)}
    write_run(tmp_path, outcomes=apart, stamp=0)
    write_run(tmp_path, outcomes={attack: [0] * 20 for attack in ATTACKS}, defense="reminder", stamp=1)
    group = board(tmp_path)["groups"][0]
    assert group["discriminating"]
    assert next(row for row in group["rows"] if row["defense"] == "reminder")["vs_undefended"]["told_from_noise"]


def test_a_ratio_over_a_gap_that_may_be_zero_is_undefined(tmp_path: Path) -> None:
    arm(tmp_path, 100, stamp=0)
    arm(tmp_path, 97, defense="tokens", method="native", stamp=1)
    arm(tmp_path, 50, defense="tokens", method="procrustes", stamp=2)
    found = {row.run: row.gap_closed for row in compared(tmp_path).groups[0].rows}
    for name in ("tokens (native)", "tokens (procrustes)"):
        closed = found[name]
        assert closed is not None
        assert closed.ratios == {"measured": None}
        assert wording.ratio_text(closed, "measured") == wording.UNDEFINED
        assert wording.ratio_text(closed, "published") == "-", "nothing is published for this model"
    assert f"| {wording.UNDEFINED} |" in tables.markdown(compared(tmp_path))


def test_a_ratio_is_undefined_where_an_exact_interval_reaches_the_native_rate(tmp_path: Path) -> None:
    apart = {attack: planted(9, 100, start=10 * i) for i, attack in enumerate(ATTACKS)}
    write_run(tmp_path, outcomes=apart, stamp=0)
    for stamp, hits in enumerate((4, 1), 1):
        outcomes = {attack: planted(hits if i == 0 else 0, 100, start=50) for i, attack in enumerate(ATTACKS)}
        path = write_run(tmp_path / str(hits), outcomes=outcomes, defense="tokens", method="native", stamp=stamp)
        table = board(tmp_path / "owner__model", path)
        undefended = rows(table)["none"]["asr_max"]
        assert undefended["interval"] == "exact"
        closed = rows(table)["tokens (native)"]["gap_closed"]["measured"]
        assert (closed is None) == (undefended["low"] <= hits / 100)


def test_without_a_native_row_there_is_no_measured_ratio(tmp_path: Path) -> None:
    arm(tmp_path, 107, model=LLAMA_3, stamp=0)
    arm(tmp_path, 0, model=LLAMA_3, defense="tokens", method="procrustes", stamp=1)
    closed = {row.run: row.gap_closed for row in compared(tmp_path).groups[0].rows}["tokens (procrustes)"]
    assert closed is not None
    assert "measured" not in closed.ratios
    assert round(closed.defined["published"].value, 2) == 1.01
    assert wording.ratio_text(closed, "measured") == "-"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 2.0}, "task version (1.0 there, 2.0 here)"),
        ({"max_gen_toks": 8}, "generation settings"),
        ({"prompt_format": "llama3"}, "prompt format (model there, llama3 here)"),
        ({"inputs": [f"Other data {i}." for i in range(208)]}, "data"),
        ({"model": "owner/other"}, "model (owner/model there, owner/other here)"),
    ],
)
def test_what_is_not_comparable_stands_apart_with_the_reason(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    arm(tmp_path, 100, stamp=0)
    arm(tmp_path, 0, defense="tokens", method="native", stamp=1, **fields)
    first, second = board(tmp_path)["groups"]
    assert first["reason"] == ""
    assert reason in second["reason"]
    assert second["rows"][0]["vs_undefended"] is None


def test_limited_and_early_runs_are_marked_and_limited_ones_stand_apart(tmp_path: Path) -> None:
    arm(tmp_path, 100, stamp=0)
    arm(tmp_path, 5, n=20, limit=20, original=208, defense="reminder", stamp=1)
    arm(tmp_path, 9, defense="sandwich", facts={"early_decision": True}, stamp=2)
    table = board(tmp_path)
    assert len(table["groups"]) == 2
    assert "n (208 there, 20 here)" in table["groups"][1]["reason"]
    text = tables.markdown(compared(tmp_path))
    assert "(limited) |" in text
    assert "(early decision) |" in text


def test_duplicates_are_reported_and_not_averaged(tmp_path: Path) -> None:
    arm(tmp_path, 100, stamp=0)
    arm(tmp_path, 90, stamp=1)
    table = board(tmp_path)
    assert [row["asr_max"]["hits"] for row in table["groups"][0]["rows"]] == [90, 100]
    assert "are the same arm (owner/model, none) run twice" in table["problems"][0]
    assert "30 of 832 outcomes differ" in table["problems"][0]
    assert len(board(tmp_path, tmp_path)["files"]) == 2  # the same file twice is one run


def test_the_reference_is_the_later_run_wherever_it_lies(tmp_path: Path) -> None:
    arm(tmp_path / "a", 100, stamp=9)
    arm(tmp_path / "b", 60, stamp=1)
    arm(tmp_path / "c", 0, defense="reminder", stamp=5)
    table = board(tmp_path)
    assert [Path(file).relative_to(tmp_path).parts[0] for file in table["files"]] == ["b", "c", "a"]
    assert rows(table)["reminder"]["vs_undefended"]["effect"] == pytest.approx(-100 / 208)


def test_a_stock_model_takes_its_defense_from_the_metadata(tmp_path: Path) -> None:
    arm(tmp_path, 100, stock=True, stamp=0)
    arm(tmp_path, 50, stock=True, defense="sandwich", stamp=1)
    arm(tmp_path, 0, stock=True, task="alpacafarm_injection_x", stamp=2)
    found = rows(board(tmp_path))
    assert [name.split(" · ")[0] for name in found] == ["sandwich", "none"]
    assert all(row["defense"] in ("none", "sandwich") for row in found.values())


def test_one_attack_alone_and_benign_prompts_alone_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, task="one", outcomes={"ignore": planted(50, 208)}, stamp=0)
    write_run(tmp_path, task="two", refusal=planted(3, 208), outcomes={}, stamp=1)
    one, two = board(tmp_path)["groups"]
    assert one["rows"][0]["asr_max"]["hits"] == 50
    assert one["rows"][0]["refusal"] is None
    assert two["rows"][0]["asr_max"] is None
    assert two["rows"][0]["refusal"]["hits"] == 3
    assert "3/208" in tables.markdown(compared(tmp_path))


def test_every_form_shows_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    four_arms(tmp_path)
    outputs = {}
    for form in ("terminal", "markdown", "csv", "latex", "json"):
        assert main(["leaderboard", str(tmp_path), "--format", form]) == 0
        outputs[form] = capsys.readouterr().out
    table = json.loads(outputs["json"])
    cells = [cell for sheet in sheets.sheets(compared(tmp_path)) for row in sheet.rows for cell in row]
    assert "0/208 = 0.0 % [0.0, 1.8]" in cells
    for form in ("markdown", "latex"):
        bare = outputs[form].replace("\\", "").replace("textless{}", "<").replace("dag{}", "†")
        assert all(cell in bare for cell in cells)
    words = set(outputs["terminal"].split())
    assert {word for cell in cells for word in cell.split()} <= words
    lines = list(csv.DictReader(io.StringIO(outputs["csv"])))
    for line, row in zip(lines, table["groups"][0]["rows"], strict=True):
        assert float(line["asr_max.low"]) == row["asr_max"]["low"]
        assert line["run"] == row["run"]
    assert r"\toprule" in outputs["latex"]


def test_a_narrow_terminal_cuts_no_figure_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = pytest.importorskip("rich.console")
    four_arms(tmp_path)
    monkeypatch.setattr(console.Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "dumb")  # 80 columns, no colours
    assert main(["leaderboard", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_names_that_a_reader_would_obey_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm(tmp_path, 100, model="=cmd()|<b>\x1b[31m_$x$")
    for form in ("terminal", "markdown", "csv", "latex"):
        assert main(["leaderboard", str(tmp_path), "--format", form]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert form != "markdown" or "\\<b\\>" in out
        assert form != "latex" or r"\_\$x\$" in out
        assert form != "csv" or "'=cmd()" in out


def test_a_tables_rows_leave_out_what_its_title_says(tmp_path: Path) -> None:
    for stamp, (model, defense) in enumerate([("o/x", "none"), ("o/x", "none"), ("o/y", "none"), ("o/y", "reminder")]):
        arm(tmp_path, 100, model=model, defense=defense, stamp=stamp)
    table = board(tmp_path)
    assert rows(table).keys() == {"none · x #1", "none · x #2"}
    names = [[row[0] for row in sheet.rows] for sheet in sheets.sheets(compared(tmp_path))]
    assert names == [["none #1", "none #2"]] * 3 + [["none", "reminder"]] * 3


def test_a_name_that_begins_like_another_stays_whole(tmp_path: Path) -> None:
    arm(tmp_path, 100, model="x/llama", prompt_format="llama3", stamp=0)
    arm(tmp_path, 100, model="y/other", prompt_format="chatml", stamp=1)
    names = [sheet.rows[0][0] for sheet in sheets.sheets(compared(tmp_path)) if "cost" not in sheet.title]
    assert set(names) == {"none"}


def test_csv_keeps_tables_of_one_title_apart(tmp_path: Path) -> None:
    arm(tmp_path, 100, stamp=0)
    arm(tmp_path, 100, version=9.0, stamp=1)
    lines = list(csv.DictReader(io.StringIO(tables.comma_separated(compared(tmp_path)))))
    assert [line["table"] for line in lines] == ["1", "2"]
    assert lines[0]["title"] == lines[1]["title"]
    assert "task version" in lines[1]["reason"]


def test_linked_folders_are_read_and_each_once(tmp_path: Path) -> None:
    arm(tmp_path / "real", 100)
    given = tmp_path / "given"
    given.mkdir()
    (given / "linked").symlink_to(tmp_path / "real")
    (given / "round").symlink_to(given)
    (given / "loop").symlink_to("loop")
    table = board(given, tmp_path / "real")
    assert (len(table["files"]), table["problems"]) == (1, [])
    assert board(given / "loop")["problems"] == [
        f"{given / 'loop'} does not exist; give the folder of lm-eval's --output_path."
    ]


def test_what_is_no_regular_file_or_has_no_possible_name_is_a_sentence(tmp_path: Path) -> None:
    good = arm(tmp_path, 100)
    os.mkfifo(tmp_path / "results_2026-01-01T00-00-00.8.json")
    (tmp_path / "results_2026-01-01T00-00-00.9.json").mkdir()
    long = json.loads(good.read_text())
    for part in ("results", "configs"):
        long[part] = {"t" * 300: next(iter(long[part].values()))}
    (tmp_path / "results_2026-01-01T00-00-00.7.json").write_text(json.dumps(long))
    table = board(tmp_path, Path("x" * 300))
    assert table["files"] == [str(good)]
    assert [
        says in problem
        for says, problem in zip(
            ("does not exist", "is missing", "is no file", "is no file"), table["problems"], strict=True
        )
    ] == [True] * 4


def test_a_run_over_all_records_is_not_limited_whatever_the_limit_was(tmp_path: Path) -> None:
    arm(tmp_path, 100, limit=1000)
    assert not board(tmp_path)["groups"][0]["rows"][0]["limited"]


def test_an_attack_may_not_be_called_like_the_other_outcome(tmp_path: Path) -> None:
    write_run(tmp_path, outcomes={"refusal": planted(3, 20), "ignore": planted(3, 20)})
    assert "is not a sample" in board(tmp_path)["problems"][0]


def test_a_bad_token_file_or_log_is_a_sentence_and_the_rest_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm(tmp_path, 100)
    (tmp_path / "log.jsonl").write_text("{}")
    report = tmp_path / "report.html"
    files = [
        "--log",
        str(tmp_path / "log.jsonl"),
        "--tokens",
        str(tmp_path / "none.safetensors"),
        "--html",
        str(report),
    ]
    assert main(["leaderboard", str(tmp_path), "--format", "csv", *files]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 2
    assert said.err.count("\n") == 2
    assert "log.jsonl does not begin" in report.read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_behind_the_output_is_a_sentence(tmp_path: Path) -> None:
    arm(tmp_path, 100)
    code = "import sys; from dtt_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", code, "leaderboard", str(tmp_path), "--format", "csv"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "dtt leaderboard: the disk is full (standard output).\n")


def test_a_terminal_that_knows_ascii_only_gets_every_table(tmp_path: Path) -> None:
    arm(tmp_path, 100)
    code = "import sys; from dtt_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "leaderboard", str(tmp_path), "--format", "markdown"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert rb"owner/model"[6:] in done.stdout
    assert rb"\xb7 alpacafarm" in done.stdout


def test_an_attacks_name_breaks_no_table(tmp_path: Path) -> None:
    write_run(tmp_path, outcomes={"<b>|$x$&lt;": planted(50, 208)})
    header, rule = [line for line in tables.markdown(compared(tmp_path)).splitlines() if line.startswith("|")][:2]
    assert r"ASR \<b\>\|\$x\$\&lt;" in header
    assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|")
    assert r"\textless{}b\textgreater{}\textbar{}\$x\$\&lt;" in tables.latex(compared(tmp_path))


def test_a_reader_that_stops_early_gets_no_traceback(tmp_path: Path) -> None:
    arm(tmp_path, 100)
    code = "import sys; from dtt_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "leaderboard", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


BAD = {
    "deep": "[" * 200_000,
    "not json": "{",
    "another thing": json.dumps({"a": 1}),
    "wrong types": json.dumps({"results": [], "configs": 3, "config": None}),
    "no injection": json.dumps({"results": {"mmlu": {"acc,none": 1}}, "configs": {"mmlu": {}}, "config": {"a": 1}}),
    "huge number": '{"results": ' + "9" * 5000 + "}",
    "path in a name": json.dumps({"results": {"../x": {"hacked,none": 0}}, "configs": {"a": 1}, "config": {"a": 1}}),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_results_file_is_a_sentence_and_the_rest_is_shown(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "results_2026-01-01T00-00-00.9.json"
    bad.write_text(BAD[kind])
    assert main(["leaderboard", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(bad) in error
    arm(tmp_path, 100)
    table = board(tmp_path)
    assert len(table["problems"]) == 1
    assert len(table["files"]) == 1


def spoil(path: Path, change: Any) -> None:
    """Apply `change` to the samples beside the results file `path`."""
    samples = next(path.parent.glob("samples_*"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    samples.write_text("\n".join(json.dumps(line) for line in change(lines)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:-1], "207 samples and"),
        (lambda lines: [*lines[:-1], lines[0]], "record 0 twice"),
        (lambda lines: [{**line, "prompt_hash": "0"} for line in lines], "does not belong to"),
        (lambda lines: [{**line, "hacked_ignore": float("nan")} for line in lines], "not 0 or 1"),
        (lambda lines: [{**line, "hacked_ignore": 10**30} for line in lines], "not 0 or 1"),
        (lambda lines: [{**line, "hacked_ignore": 1 - line["hacked_ignore"]} for line in lines], "does not belong to"),
        (
            lambda lines: [{**line, "doc": {**line["doc"], "record_id": "1"}} for line in lines],
            "line 1, is not a sample",
        ),
        (lambda lines: [{**line, "filtered_resps": None} for line in lines], "line 1, is not a sample"),
        (lambda lines: [], "is empty"),
        (lambda lines: [1, *lines], "line 1, is not a sample"),
    ],
)
def test_samples_that_are_not_the_runs_are_told(tmp_path: Path, change: Any, says: str) -> None:
    spoil(arm(tmp_path, 100), change)
    runs, problems = read_runs([tmp_path])
    assert runs == []
    assert len(problems) == 1
    assert says in problems[0]


def test_a_fingerprint_of_the_wrong_type_is_told(tmp_path: Path) -> None:
    path = arm(tmp_path, 100)
    results = json.loads(path.read_text())
    results["config"]["dtt_plugin"]["fingerprint"] = [{}]
    path.write_text(json.dumps(results))
    runs, problems = read_runs([tmp_path])
    assert runs == []
    assert "does not belong to" in problems[0]


def test_samples_of_another_arm_missing_samples_and_unknown_defenses_are_told(tmp_path: Path) -> None:
    first, second = arm(tmp_path / "a", 100), arm(tmp_path / "b", 100, defense="tokens", method="native")
    names = [next(path.parent.glob("samples_*")) for path in (first, second)]
    spoil(second, lambda lines: [{**line, "arguments": {}} for line in lines])
    arm(tmp_path / "c", 100, defense="prayer" * 2000)
    third = arm(tmp_path / "d", 100)
    next(third.parent.glob("samples_*")).unlink()
    runs, problems = read_runs([tmp_path])
    assert [run.samples for run in runs] == [names[0]]
    assert [len(problem) < 500 for problem in problems] == [True] * 3
    assert "does not belong" in problems[0]
    assert "prayerpr…' is not a defense" in problems[1]
    assert "is missing" in problems[2]


def test_broken_utf8_is_a_sentence(tmp_path: Path) -> None:
    path = arm(tmp_path, 100)
    samples = next(path.parent.glob("samples_*"))
    whole = samples.read_bytes()
    for broken in (whole[:-30] + b"\xff\xfe\n", whole.replace(b"Data of", rb"\ud800 of")):
        samples.write_bytes(broken)
        runs, problems = read_runs([tmp_path])
        assert runs == []
        assert "not readable JSON" in problems[0]


def test_a_hundred_runs_take_seconds_and_no_torch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for stamp in range(100):
        outcomes = {attack: (rng.random(208) < rng.random()).astype(int).tolist() for attack in ATTACKS}
        method = f"{stamp}" if stamp else ""
        defense = "tokens" if stamp else "none"
        write_run(tmp_path, outcomes=outcomes, refusal=planted(2, 208), defense=defense, method=method, stamp=stamp)
    code = (
        "import sys; from dtt_plugin.cli import main; code = main(['leaderboard', sys.argv[1], '--json']);"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules); sys.exit(code)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(json.loads(done.stdout)["files"]) == 100
    assert time.perf_counter() - started < 60  # measured: under 10 s on two cores


def test_our_commands_record_what_they_cost_and_the_leaderboard_finds_it(tiny: str, tmp_path: Path) -> None:
    source = str(make_checkpoint(tmp_path / "source", width=32, seed=1))
    tokens = write_tokens(tmp_path / "t.safetensors", width=32, model=source, method="native")
    alignment, moved, baked = (str(tmp_path / name) for name in ("w.safetensors", "moved.safetensors", "baked"))
    assert main(["align", source, tiny, "-o", alignment, "--no-cache"]) == 0
    assert main(["transfer", tokens, alignment, "-o", moved]) == 0
    costs = recorded_costs(load_tokens(moved).metadata)
    assert set(costs) == {"align_seconds", "transfer_seconds", "peak_memory_mb"}
    assert costs["align_seconds"] > costs["transfer_seconds"] > 0
    assert costs["peak_memory_mb"] > 10
    assert main(["bake", tiny, "--tokens", moved, "--out", baked]) == 0
    arm(tmp_path / "out", 0, model=baked, stock=True, defense="tokens")
    row = board(tmp_path / "out")["groups"][0]["rows"][0]
    assert (public_name(row["model"]), row["defense"]) == (public_name(tiny), "tokens (procrustes)")
    assert row["cost"]["pipeline_s"] == pytest.approx(
        sum(row["cost"][f"{step}_s"] for step in ("align", "transfer", "bake"))
    )
    assert row["cost"]["speedup"] is None, "what training this model's own tokens costs is not known"
    assert row["cost"]["align_s"] == costs["align_seconds"]
    assert row["cost"]["bake_s"] > 0
