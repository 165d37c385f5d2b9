"""`make gpu-check` without a GPU: the same code on the processor, and on a device of which only the shapes are real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_check

torch = pytest.importorskip("torch")


def test_a_rehearsal_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LIMIT_SECONDS", 0)  # a rehearsal has no limit
    page, figures = tmp_path / "gpu.md", tmp_path / "gpu.json"
    page.write_text(f"# A page\n\n{gpu_check.MARK}\n\nNot measured.\n")
    arguments = ["--device", "cpu", "--size", "tiny", "--json", str(figures), "--markdown", str(page)]
    assert gpu_check.main(arguments) == 0
    report = json.loads(figures.read_text())
    parts = report["parts"]
    assert {name: found.get("error") for name, found in parts.items()} == dict.fromkeys(gpu_check.PARTS)
    assert parts["alignment"]["engine"] == "numpy float64"
    assert parts["generation"]["responses"] > 0
    assert parts["generation"]["different"] == parts["generation"]["logits_differ_by"] == 0
    assert parts["generation"]["tokens_per_second"] > 0
    assert len(parts["training"]["losses"]) == gpu_check.SIZES["tiny"].steps
    written = page.read_text()
    assert written.startswith("# A page\n")
    assert "Not measured" not in written
    assert "a rehearsal on the processor" in written
    assert "| attack | seconds per step by default | " in written


def test_a_part_that_fails_is_told_and_takes_no_other_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_check.run_parts(["training"], tmp_path, "tiny", "cpu", 300)
    assert found["training"]["error"].startswith("ended with the code ")
    assert "model" in capsys.readouterr().err
    table = gpu_check.markdown(
        {"machine": dict.fromkeys(("date", "processor", "cores", "versions"), "?"), "size": "tiny", "device": "?"}
        | {"seconds": 1.0, "parts": {name: {"error": "no"} for name in gpu_check.PARTS}}
    )
    assert "| attack | error | no |" in table
    assert not any(gpu_check.holds(goal, found | {goal.part: {"error": "no"}}) for goal in gpu_check.GOALS)


def test_without_a_gpu_a_sentence_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "torch finds no NVIDIA GPU here" in capsys.readouterr().err
