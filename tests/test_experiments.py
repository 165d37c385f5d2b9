"""The registered experiments' token files and probes on tiny models: every arm is there, and nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import experiments
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import default_vocab_tokens, make_checkpoint
from tests.conftest import write_tokens

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
    own = write_tokens(tmp_path / "own.safetensors", width=48, norm=5.0)
    command = [sys.executable, "-m", "benchmarks.results.experiments", "--small", str(tmp_path / "small")]
    command += ["--large", str(tmp_path / "large"), "--native", tokens, "--native-large", own]
    command += ["--only", "E1", "--probe-only", "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "out" / "E1"
    probed = sorted(path.stem for path in (folder / "probe").glob("*.json"))
    arms = [*experiments.MAPS, *experiments.ISOMETRIES, "zero-pad", "native"]
    assert probed == sorted(arms)
    before = np.linalg.norm(load_tokens(tokens).rows, axis=1)
    for arm in set(arms) - {"native"}:
        moved = load_tokens(folder / f"{arm}.safetensors")
        assert moved.width == 48
        np.testing.assert_allclose(np.linalg.norm(moved.rows, axis=1), before, rtol=1e-5)
    assert len({json.loads(path.read_text())["digest"] for path in (folder / "probe").glob("*.json")}) == len(arms)
    assert len(json.loads((folder / "pairing.json").read_text())["cosine_of_tokens_by_head_and_by_embedding"]) == 5
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = subprocess.run([*command, "--tables"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    assert sum(line.startswith("| random-") for line in lines) == 5
    assert any(line.startswith("| procrustes |") and line.count("|") == 8 for line in lines)
    repeated = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert repeated.returncode == 0, repeated.stderr
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
