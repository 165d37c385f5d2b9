"""Training on several processes: two on the CPU, over gloo, as `torchrun` starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.training import TrainingOptions, train
from dtt_plugin.training.processes import share
from tests.conftest import ROOT

pytest.importorskip("torch")
DATA = ROOT / "tasks" / "injection_demo" / "train.json"


@pytest.fixture
def options(tiny: str, tmp_path: Path) -> TrainingOptions:
    content = json.loads(DATA.read_text(encoding="utf-8"))
    (tmp_path / "records.json").write_text(json.dumps(content | {"records": content["records"][:16]}))
    return TrainingOptions(
        tiny, str(tmp_path / "records.json"), tmp_path / "one.safetensors", k=3, steps=20, batch=4, label_tokens=4,
        save_every=5, eval_every=10, held_out=4,
    )  # fmt: skip


def start_two(options: TrainingOptions, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--no-python", sys.executable, "-c", "from dtt_plugin.cli import main; raise SystemExit(main())"]
    command += ["train", options.model, "--data", options.data, "--out", str(options.out)]
    for name in ("k", "steps", "batch", "label_tokens", "save_every", "eval_every", "held_out"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def entries(options: TrainingOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.log.read_text().splitlines()[1:]]


def losses(options: TrainingOptions) -> list[float]:
    return [entry["loss"] for entry in entries(options) if "loss" in entry]


def test_a_batch_is_divided_evenly_or_refused() -> None:
    assert share(16, 1) == 16
    assert share(16, 4) == 4
    with pytest.raises(DttError, match="--batch 16 can't be divided among 3 processes"):
        share(16, 3)


def test_two_processes_have_the_curve_of_one_and_one_of_them_writes(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    two = replace(options, out=tmp_path / "two.safetensors")
    run = start_two(two)
    output, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors[-3000:]
    assert output.count(str(two.out)) == 1, "one report"
    assert [entry["step"] for entry in entries(two)] == [entry["step"] for entry in entries(options)]
    assert len(losses(two)) == 20
    np.testing.assert_allclose(losses(two), losses(options), rtol=1e-4)
    np.testing.assert_allclose(load_tokens(two.out).rows, load_tokens(options.out).rows, atol=1e-3)
    measured = [[entry["asr"] for entry in entries(run) if "asr" in entry] for run in (two, options)]
    assert measured[0] == measured[1]
    assert not two.checkpoints.exists()


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_curve(options: TrainingOptions, tmp_path: Path) -> None:
    train(options)
    two = replace(options, out=tmp_path / "two.safetensors")
    run = start_two(two)
    deadline = time.monotonic() + 400
    while not list(two.checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=100)
    assert not two.out.exists()
    run = start_two(two, "--resume")
    _, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors[-3000:]
    assert len(losses(two)) == 20
    np.testing.assert_allclose(losses(two), losses(options), rtol=1e-4)
