"""The registered experiments' token files and probes on tiny models: every arm is there, and nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.results import experiments
from benchmarks.results.kept import Kept
from benchmarks.results.steps import evaluate
from dtt_plugin.errors import DttError
from dtt_plugin.sweep.file import Cell
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import default_vocab_tokens, make_checkpoint
from tests.conftest import write_tokens
from tests.lm_eval_output import planted, write_run

pytest.importorskip("torch")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]


def test_the_first_experiment_probes_every_arm_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(300)]
    for name, width in (("small", 32), ("large", 48)):
        embedding = generator.standard_normal((len(words) + 268, width))
        vocabulary = [*default_vocab_tokens(), *words]
        make_checkpoint(tmp_path / name, width=width, vocab_tokens=vocabulary, embedding=embedding, tied=False)
    tokens = write_tokens(tmp_path / "native.safetensors", width=32, norm=5.0)
    (tmp_path / "kept" / "tokens").mkdir(parents=True)
    for seed, name in enumerate(("native-large.safetensors", "native-large.step-25.safetensors")):
        write_tokens(tmp_path / "kept" / "tokens" / name, width=48, norm=5.0, seed=seed)
    (tmp_path / "kept" / "tokens" / "native-large.log.jsonl").write_text("{}\n")
    command = [sys.executable, "-m", "benchmarks.results", "--small", str(tmp_path / "small")]
    command += ["--large", str(tmp_path / "large"), "--native", tokens]
    command += ["--only", "E1", "--probe-only", "--out", str(tmp_path / "out")]
    command += ["--kept", str(tmp_path / "kept"), "--docs", str(tmp_path / "docs")]
    (tmp_path / "docs").mkdir()
    first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "out" / "E1"
    probes = Kept(tmp_path / "kept").probes("E1")
    arms = [*experiments.MAPS, *experiments.ISOMETRIES, "zero-pad", "native"]
    assert sorted(probes) == sorted(arms)
    assert {facts["model"] for facts in probes.values()} == {Path(experiments.LARGE).name}
    assert 0 < probes["procrustes"]["relative_residual"] < 1.5
    assert probes["native"]["relative_residual"] is None
    before = np.linalg.norm(load_tokens(tokens).rows, axis=1)
    for arm in set(arms) - {"native"}:
        moved = load_tokens(folder / f"{arm}.safetensors")
        assert moved.width == 48
        np.testing.assert_allclose(np.linalg.norm(moved.rows, axis=1), before, rtol=1e-5)
    assert len({facts["digest"] for facts in probes.values()}) == len(arms)
    assert len(json.loads((folder / "pairing.json").read_text())["cosine_of_tokens_by_head_and_by_embedding"]) == 5
    lines = (tmp_path / "docs" / "results.md").read_text().splitlines()
    assert sum(line.startswith("| random-") for line in lines) == 5
    assert any(line.startswith("| procrustes |") and line.count("|") == 8 for line in lines)
    assert "Registered and not measured yet: E0, E2, E3, E4, E5, E6." in lines
    files = {path: path.stat().st_mtime_ns for at in ("out", "kept") for path in (tmp_path / at).rglob("*.*")}
    repeated = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert repeated.returncode == 0, repeated.stderr
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("E1").mkdir()
    make_checkpoint(Path(experiments.LARGE), width=32)
    tokens = Path("E1/procrustes.safetensors")
    write_tokens(tokens, width=32)
    ran = []

    def run_sweep(cells: Sequence[Cell], out: Path) -> list[Cell]:
        ran.append([cell.name.rsplit("--", 1)[-1] for cell in cells])
        for cell in cells:
            facts = {"tokens_sha256": load_tokens(tokens).digest} if cell.load.tokens else {}
            arm: dict[str, Any] = {
                "defense": cell.defense,
                "method": "procrustes" if cell.load.tokens else "",
                "facts": facts,
            }
            folder = cell.folder(out)
            write_run(folder, model=experiments.LARGE, outcomes={"ignore": planted(2, 4)}, original=9, limit=4, **arm)
        return [cell for cell in cells if cell.defense == "reminder"]

    monkeypatch.setattr("dtt_plugin.sweep.run.run_sweep", run_sweep)
    kept = Kept(tmp_path / "kept")
    arguments = ("E1-4", experiments.LARGE, ["none", "reminder"], [tokens])
    for _ in range(2):
        with pytest.raises(DttError, match="reminder"):
            evaluate(kept, *arguments, limit=4)
    assert ran == [["none", "reminder", "procrustes"], ["reminder"]]
    assert sorted(kept.runs("E1-4")) == ["none", "procrustes"]
    assert {run.model for run in kept.runs("E1-4").values()} == {Path(experiments.LARGE).name}
    assert kept.names("E1") == ["E1-4"]
    write_tokens(tokens, width=32, seed=1)
    with pytest.raises(DttError):
        evaluate(kept, *arguments, limit=4)
    assert ran[2] == ["reminder", "procrustes"], "other tokens are another arm"


def test_trained_tokens_are_kept_and_come_back_only_whole(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    files = [tmp_path / name for name in ("native-large.safetensors", "native-large.step-25.safetensors")]
    for seed, file in enumerate(files):
        write_tokens(file, width=8, seed=seed)
    before = [load_tokens(file).digest for file in files]
    kept.keep_tokens(files[0])
    assert not kept.fetch_tokens(*files)
    kept.keep_tokens(files[1])
    for file in files:
        file.unlink()
    assert kept.fetch_tokens(*files)
    assert [load_tokens(file).digest for file in files] == before
