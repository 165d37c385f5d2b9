"""A sibling's fine-tuning that was interrupted goes on to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from benchmarks.results import drift
from tests.checkpoints import make_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_an_interrupted_drift_ends_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", dtype="float32")
    data = tmp_path / "data.json"
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"The answer is {n}."} for n in range(40)]
    data.write_text(json.dumps(records))
    monkeypatch.setattr(drift, "SAVE_EVERY", 5)
    whole = drift.drift(str(model), data, tmp_path / "whole", steps=12)

    step = transformers.Trainer.training_step
    taken: list[None] = []

    def dies_at_the_eighth(self: Any, *arguments: Any, **named: Any) -> Any:
        taken.append(None)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    monkeypatch.setattr(transformers.Trainer, "training_step", dies_at_the_eighth)
    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        drift.drift(str(model), data, out, steps=12)
    # A machine that dies while it saves leaves a checkpoint without its state.
    (tmp_path / "resumed.checkpoints" / "checkpoint-10").mkdir()
    resumed = drift.drift(str(model), data, out, steps=12)

    assert len(taken) == 8 + 7, "the first five steps are not taken again"
    assert resumed == whole
    before, after = load_file(tmp_path / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    assert not (tmp_path / "resumed.checkpoints").exists()
