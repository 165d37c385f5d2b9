"""The pages of results: made of what is kept beside them, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results.kept import Kept
from benchmarks.results.page import section, verdict, write_page
from dtt_plugin.cli import main
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.leaderboard.outcome_files import ENDING, write_outcomes
from dtt_plugin.leaderboard.runs import Run
from tests.lm_eval_output import planted, write_run

DOCS = Path(__file__).parents[1] / "docs"
OUTCOMES = DOCS / "results" / "outcomes"


def test_the_page_is_made_from_the_outcomes_beside_it(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write_page(tmp_path, Kept(OUTCOMES))
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text(), "make it by --page-only"
    for made in (tmp_path / "results").iterdir():
        assert made.read_bytes() == (DOCS / "results" / made.name).read_bytes()


def _runs(folder: Path, hits: dict[str, int]) -> dict[str, Run]:
    """Write and read runs in which ARM is hacked on so many of 100 records."""
    methods = {"procrustes": "procrustes", "native": "trained"}
    for number, (arm, n) in enumerate(hits.items()):
        facts = {"tokens_sha256": f"{number:064x}"}
        arm_facts: dict[str, Any] = {"defense": "tokens", "method": methods.get(arm, "random"), "facts": facts}
        write_run(folder / arm, outcomes={"ignore": planted(n, 100)}, **(arm_facts if arm != "none" else {}))
    return {arm: replace(read_run(folder / arm), label=arm) for arm in hits}


@pytest.mark.parametrize(
    ("hits", "found"),
    [
        ({"none": 80, "native": 0, "procrustes": 10, "random-0": 78, "random-1": 82}, "works; gap closed 0.875"),
        ({"none": 80, "native": 0, "procrustes": 10, "random-0": 78, "random-1": 12}, "undecided; gap closed 0.875"),
        (
            {"none": 80, "native": 0, "procrustes": 76, "random-0": 78, "random-1": 82},
            "does not work; gap closed 0.050",
        ),
        ({"none": 80, "procrustes": 76, "random-0": 78}, "not shown to work"),
        ({"none": 80, "native": 0, "procrustes": 10}, "undecided; gap closed 0.875"),
        ({"none": 80, "native": 0, "procrustes": 76}, "does not work; gap closed 0.050"),
    ],
)
def test_the_registered_rule_decides_what_is_said_of_procrustes(
    tmp_path: Path, hits: dict[str, int], found: str
) -> None:
    runs = _runs(tmp_path, hits)
    assert verdict(runs, build([*runs.values()])).startswith(found)


def test_the_readmes_figures_are_those_of_the_page() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    page = "".join(
        (DOCS / name).read_text() for name in ("results.md", "earlier-results.md", "suite-results.md")
    ).replace("\\", "")
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


def test_a_twin_is_judged_by_outcomes_that_differ_and_not_by_rates(tmp_path: Path) -> None:
    for arm, hits in (("native", planted(2, 10)), ("procrustes", planted(2, 10)[::-1])):
        write_run(tmp_path / "runs" / arm, outcomes={"ignore": hits}, defense="tokens", facts={"tokens_sha256": "0"})
        folder = tmp_path / "kept" / ("E0-own-10" if arm == "native" else "E0-twin-10")
        folder.mkdir(parents=True)
        write_outcomes(folder / f"model--tokens--{arm}{ENDING}", [read_run(tmp_path / "runs" / arm)])
    assert "| procrustes | 4 of 10 |" in section("E0", Kept(tmp_path / "kept")).splitlines()
