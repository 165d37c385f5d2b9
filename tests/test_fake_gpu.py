"""The paths of a GPU on a machine without one: on a device of which only shapes and places are real (`FakeGpu`).

`make gpu-check` runs them for real where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtt_plugin.alignment.engine import TorchEngine
from dtt_plugin.attack.options import BUDGETS
from dtt_plugin.tasks.attacks import HACKED
from tests import conftest
from tests.checkpoints import make_checkpoint

torch = pytest.importorskip("torch")

from dtt_plugin.attack.candidates import draw  # noqa: E402
from dtt_plugin.attack.objective import Objective, Target  # noqa: E402
from dtt_plugin.attack.soft import soft_attack  # noqa: E402
from dtt_plugin.model_wrappers.early_decision import EndDecided  # noqa: E402
from dtt_plugin.model_wrappers.hf import DttHF  # noqa: E402
from dtt_plugin.probe.measure import divergences, label_distributions, scores  # noqa: E402
from dtt_plugin.training.chat_model import load_chat_model  # noqa: E402
from dtt_plugin.training.soft_prompt import Example, SoftPrompt  # noqa: E402
from tests.fake_gpu import GPU, FakeGpu  # noqa: E402

EXAMPLES = [Example([1, 2, 3], [4, 5]), Example([6, 7], [8])]


@pytest.fixture
def gpu() -> Iterator[None]:
    with FakeGpu():
        yield


@pytest.fixture
def soft_prompt(tiny: str, gpu: None) -> SoftPrompt:
    """A model on the GPU under three rows that come from elsewhere."""
    return SoftPrompt(load_chat_model(tiny, dtype="bfloat16").model.to(GPU), torch.ones(3, 32))


@pytest.mark.parametrize("operation", ["add", "matmul", "__getitem__"])
def test_two_places_are_told_apart(operation: str, gpu: None) -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=GPU)
    if operation == "__getitem__":
        assert there[torch.tensor([0, 2])].shape == (2, 3), "an index may be elsewhere"
        return
    with pytest.raises(AssertionError, match="two places"):
        getattr(there, operation)(here)
    assert getattr(there, operation)(here.to(GPU)).device.type == GPU


def test_an_alignment_computes_on_the_gpu(gpu: None) -> None:
    engine, square = TorchEngine(GPU), np.eye(4)
    for bfloat16 in (True, False):
        cross: Any = engine.cross(4, 6)
        cross.add(np.ones((8, 4), np.float32), np.ones((8, 6), np.float32), bfloat16=bfloat16)
        assert (cross._sum.device.type, cross._sum.dtype) == (GPU, torch.float64)
        assert cross.total().shape == (4, 6)
    for found in (engine.gram(square), engine.matmul(square, square), *engine.eigh(square), *engine.svd(square)):
        assert isinstance(found, np.ndarray)
        assert not found.any(), "read from the GPU"


def test_the_same_code_gives_the_processors_numbers() -> None:
    """For torch "cpu:0" is the processor; for the engine it is a device."""
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal((40, n)).astype(np.float32) for n in (4, 6))
    device, plain = TorchEngine("cpu:0"), TorchEngine("cpu")
    cross = device.cross(4, 6)
    cross.add(x[:30], y[:30], bfloat16=False)
    cross.add(x[30:], y[30:], bfloat16=False)
    np.testing.assert_allclose(cross.total(), x.T.astype(float) @ y, atol=1e-5)
    M = (x.T @ x).astype(np.float64)
    np.testing.assert_allclose(device.gram(M), plain.gram(M), rtol=1e-12)
    np.testing.assert_allclose(device.matmul(M, M), plain.matmul(M, M), rtol=1e-12)
    np.testing.assert_allclose(device.eigh(M.copy()).values, plain.eigh(M.copy()).values, rtol=1e-9)
    np.testing.assert_allclose(device.svd(M).s, plain.svd(M).s, rtol=1e-9)


def test_training_computes_on_the_gpu(soft_prompt: SoftPrompt) -> None:
    loss = soft_prompt(EXAMPLES)
    loss.backward()
    assert soft_prompt.rows.grad is not None
    assert loss.device.type == soft_prompt.rows.device.type == soft_prompt.rows.grad.device.type == GPU
    assert list(soft_prompt.passes(EXAMPLES, 512)) == [EXAMPLES]
    assert len(soft_prompt.generate([[1, 2], [3]], 2, pad=0)) == 2


def test_a_probe_computes_on_the_gpu(soft_prompt: SoftPrompt) -> None:
    prompts, labels = [[1, 2], [3]], [[3, 4], [5]]
    found = scores(soft_prompt, prompts, labels)
    assert {one.device.type for one in found.first} == {GPU}
    clean = label_distributions(soft_prompt, prompts, labels)
    assert divergences(soft_prompt, clean, prompts, labels).tolist() == [0, 0]


def test_an_attack_computes_on_the_gpu(soft_prompt: SoftPrompt) -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "no")
    place: Any = SimpleNamespace(head=[1, 2, 3], start=[4, 5, 6], tail=[7, 8], rule=HACKED)
    place.renderer = SimpleNamespace(tokenizer=tokenizer)
    objective = Objective(soft_prompt, place, Target("x", [9, 10]), positions_at_once=16)
    objective.check_cache()
    losses, slope = objective.slope(place.start)
    assert losses.loss.device.type == slope.device.type == GPU
    assert slope.shape == (3, len(soft_prompt.embed.weight))
    found = objective.of_candidates([[4, 5, 7], [4, 11, 6], [12, 5, 6]])
    assert (found.loss.device.type, found.loss.shape) == ("cpu", (3,))
    assert draw(place.start, torch.arange(200), BUDGETS["lite"], torch.Generator(), slope)
    teacher = torch.zeros(2, slope.shape[1], device=GPU)
    objective.aim(Target("x", [9, 10], teacher))
    assert objective.of_current(place.start).loss.device.type == GPU
    assert soft_attack(objective, 2).steps == 2


def test_a_decided_row_ends_on_the_gpu(gpu: None) -> None:
    settled: Any = SimpleNamespace(of=lambda ids: "")
    ending = EndDecided(2, [5], settled, [lambda text: True, lambda text: False])
    scores = ending(torch.ones(2, 3, dtype=torch.long, device=GPU), torch.ones(2, 9, device=GPU))
    assert (scores.device.type, scores.shape) == (GPU, (2, 9))


@pytest.mark.parametrize("tied", [True, False])
def test_dtt_hf_answers_on_the_gpu(
    tied: bool, tiny_tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda **_: nullcontext())  # knows real devices only
    folder = make_checkpoint(tmp_path / "model", width=32, tied=tied)

    class OnGpu(DttHF):
        def _create_model(self, *args: Any, **options: Any) -> None:
            super()._create_model(*args, **options)
            self._model.to(GPU)
            self._device = torch.device(GPU)

    with FakeGpu():
        model = OnGpu(pretrained=str(folder), tokens=tiny_tokens, max_length=4096, device="cpu")
        assert {weight.device.type for weight in model.model.parameters()} == {GPU}
        results = conftest.evaluate(model, {"tokens": tiny_tokens}, limit=1)
    assert results["samples"]["injection_demo"][0]["resps"]


def test_a_chat_model_is_loaded_onto_the_gpu_in_the_checkpoints_type(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def to(self: Any, *where: Any) -> Any:
        asked.append(where)
        return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    loaded = load_chat_model(tiny).model
    assert asked == [("cuda",)]
    assert loaded.dtype == torch.bfloat16
