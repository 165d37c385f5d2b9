"""The group of all benchmarks: it runs with what is there, and says what is not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dtt_plugin.data.records import SENTENCES_FILE
from dtt_plugin.data.sources import BENCHMARKS, CYBERSECEVAL2_FILE, SEP_892_FILE
from dtt_plugin.errors import DttError
from tests import conftest
from tests.tasks.described import run

SHIPPED = ["injection_demo", "injection_fidelity"]


def members(**metadata: object) -> list[str]:
    loaded = conftest.our_tasks(**metadata).load("prompt_injection")
    assert list(loaded["groups"]) == ["prompt_injection"]
    return list(loaded["tasks"])


def test_with_nothing_fetched_it_runs_what_is_shipped_and_names_the_rest_in_one_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        results = run(tiny, "prompt_injection", limit=1, tokens=2)
    assert set(results["results"]) - {"prompt_injection"} == set(SHIPPED)
    [line] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "\n" not in line
    for name in (
        "alpacafarm_injection",
        "sep_injection",
        "bipia_injection",
        "injecagent_100",
        "cyberseceval2_injection",
        "injection_records",
        "dtt fetch",
    ):
        assert name in line


def test_what_is_at_hand_is_in_it(benchmark_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    for name in (SEP_892_FILE, CYBERSECEVAL2_FILE, SENTENCES_FILE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(benchmark_data / name)
    record = {"instruction": "i", "data": "d", "injection": "j", "success": {"rule": "contains_any", "texts": ["j"]}}
    (tmp_path / "mine.jsonl").write_text(json.dumps(record))
    assert members(records=str(tmp_path / "mine.jsonl")) == [
        *SHIPPED,
        "sep_injection_892",  # for the whole of SEP
        "cyberseceval2_injection",
        "cyberseceval2_injection_split",
        "injection_records",
    ]


@pytest.mark.slow
def test_every_benchmark_can_be_in_it(benchmark_data: Path) -> None:
    found = set(members())
    with_files = {source.set for source in BENCHMARKS} - {"utility"}
    assert {name for name in with_files if any(task.startswith(name) for task in found)} == with_files


def test_an_altered_file_is_no_missing_one(
    benchmark_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    (tmp_path / "sep").mkdir()
    (tmp_path / SEP_892_FILE).write_text("[]")
    with pytest.raises(DttError, match="is not the known file"):
        members()
