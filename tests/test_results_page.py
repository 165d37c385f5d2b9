"""docs/results.md: what was not measured again stays."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results.page import _table, write_page
from dtt_plugin.cli import main
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.tokens.files import DefensiveTokens, save_tokens
from tests.lm_eval_output import planted, write_run

DOCS = Path(__file__).parents[1] / "docs"
OUTCOMES = DOCS / "results" / "outcomes"


def test_a_run_that_finished_nothing_leaves_the_page_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(DOCS / "results.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    write_page(tmp_path)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
    assert not os.listdir(tmp_path / "results")


def test_a_finished_section_is_written_anew_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(DOCS / "results.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("costs.json").write_text("{}")
    os.utime("costs.json", (0, 10**9))  # 2001-09-09
    Path("tokens").mkdir()
    native = DefensiveTokens(
        rows=np.ones((5, 8), np.float32),
        model="tiny",
        method="trained",
        prompt_format="model",
        metadata={"steps": "25"},
    )
    save_tokens(Path("tokens/native.safetensors"), native)
    for name, value in (("none", -1.0), ("native", -1.5)):
        Path(f"log_likelihood-{name}.json").write_text(f'{{"mean": {value}, "values": [{value}, {value}]}}')
        choices = '"social_iqa": [1, 0], "vitaminc_fact_verification": [1, 1]'
        chance = '"social_iqa": 0.25, "vitaminc_fact_verification": 0.5'
        Path(f"multiple_choice-{name}.json").write_text(f'{{"correct": {{{choices}}}, "chance": {{{chance}}}}}')
    write_page(tmp_path)
    before, after = (folder.joinpath("results.md").read_text().split("\n## Utility\n") for folder in (DOCS, tmp_path))
    assert after[0] == before[0]
    assert "Measured 2001-09-09; " in after[1]
    assert "`native`: after 25 steps." in after[1]
    assert "| native | -1.500 | -0.500 ± 0.000 |" in after[1]
    assert "| social_iqa | 25.0 % | native | 1/2 = 50.0 %" in after[1]


def test_a_table_begins_with_a_verdict_from_its_tests_and_has_no_legend_of_its_own(tmp_path: Path) -> None:
    for name, hits in (("none", 80), ("reminder", 78), ("sandwich", 3)):
        write_run(tmp_path / name, defense=name, outcomes={"ignore": planted(hits, 100)})
    text = _table(read_runs([tmp_path])[0])
    verdict = text.splitlines()[2]
    assert verdict.startswith("sandwich brings ASR(max) from 80.0 % to 3.0 % ")
    assert "reminder" not in verdict
    assert "Clopper-Pearson" not in text


def test_the_readmes_figures_are_those_of_the_page() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    page = "".join((DOCS / name).read_text() for name in ("results.md", "suite-results.md")).replace("\\", "")
    found = re.findall(r"\d+\.\d % \[\d+\.\d, \d+\.\d\]", readme)
    assert len(found) >= 4
    assert [figure for figure in found if figure not in page] == []


def test_the_table_over_benchmarks_is_made_from_the_outcomes_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(OUTCOMES / "suite"), "--format", "markdown"]) == 0
    table = capsys.readouterr().out.split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert "\n".join(rows) in (DOCS / "suite-results.md").read_text()


def test_the_report_in_the_docs_is_made_from_the_outcomes_beside_it(tmp_path: Path) -> None:
    made = tmp_path / "report.html"
    folders = [str(OUTCOMES / name) for name in ("suite", "attacks")]
    assert main(["leaderboard", *folders, "--without-samples", "--html", str(made)]) == 0
    kept = DOCS / "results" / "report.html"
    assert made.read_bytes() == kept.read_bytes(), "make it anew by the commands in docs/suite-results.md"


def test_every_file_of_the_results_is_linked_from_a_page() -> None:
    pages = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    kept = [path for path in (DOCS / "results").iterdir() if path != OUTCOMES]
    unlinked = [path.name for path in (*kept, *OUTCOMES.iterdir()) if f"{path.relative_to(DOCS)})" not in text]
    assert unlinked == []
