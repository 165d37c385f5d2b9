"""The kv ceiling test: its positive controls, a model to itself and to its turned twin, and the cache it writes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.errors import DttError
from dtt_plugin.probe.run import SHIPPED_DATA, ProbeOptions, probe
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.transfer.twin import write_twin
from tests.bake_helpers import load, tiny
from tests.conftest import write_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.results import kv_ceiling  # noqa: E402  (needs torch)


def write_model(folder: Path) -> Path:
    return tiny(folder, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tokens(tmp_path_factory.mktemp("tokens") / "t.safetensors", width=32, norm=9.0))


def test_keys_and_values_in_the_cache_do_what_the_tokens_do(base: Path, tokens: Path) -> None:
    """Packed, padded and token by token: other rows under the tokens' own keys and values are the tokens."""
    from dtt_plugin.training.soft_prompt import Example, SoftPrompt

    model = load(base)
    rows = load_tokens(tokens).rows
    real, blank = (SoftPrompt(model, torch.from_numpy(r)) for r in (rows, np.zeros_like(rows)))
    _, both = kv_ceiling.recorded(model, [kv_ceiling.token_embeddings(real)], 0)
    wanted = [kv_ceiling.KeysValues(*np.split(layer, 2, axis=1)) for layer in both]
    prompts = [[3, 50, 17, 200, 90], [7, 8], [100, 101, 102]]
    examples = [Example(prompt, [5, 6]) for prompt in prompts]
    with torch.no_grad():
        expected, other = real.label_logits(examples), blank.label_logits(examples)
        answers = real.generate(prompts, 6, pad=0)
        with kv_ceiling.injected(model, wanted):
            found = blank.label_logits(examples)
            generated = blank.generate(prompts, 6, pad=0)
        after = blank.label_logits(examples)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(other, expected, atol=0.1), "the tokens matter"
    assert generated == answers
    assert torch.equal(after, other), "nothing is left behind"


@pytest.mark.parametrize("to_twin", [False, True])
def test_the_ceiling_is_the_tokens_own_effect_where_a_linear_map_exists(
    base: Path, tokens: Path, tmp_path: Path, to_twin: bool
) -> None:
    target = tmp_path / "twin" if to_twin else base
    if to_twin:
        write_twin(str(base), target, seed=3)
    report = kv_ceiling.ceiling(str(base), str(target), tokens)
    [own] = probe(ProbeOptions(str(base), (tokens,), SHIPPED_DATA, isometries=2)).tokens
    mapped = report["mapped"]["effect"]
    assert min(min(layer["r2_keys"], layer["r2_values"]) for layer in report["layers"]) > 0.9999
    assert mapped["loss_attacked"]["mean"] == pytest.approx(own.effect.loss_attacked.mean, rel=1e-2)
    assert mapped["kl_clean"]["mean"] == pytest.approx(own.effect.kl_clean.mean, rel=2e-2)
    other = report["isometry"]["effect"]["kl_clean"]["mean"]
    assert other != pytest.approx(own.effect.kl_clean.mean, rel=1e-3), "another prefix has another effect"
    assert set(report["asr_undefended"]) == set(report["mapped"]["asr"])
    assert json.loads(json.dumps(report))["passes"] in (True, False)


def test_a_regression_that_can_t_be_has_an_r2_near_zero() -> None:
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal((600, width)).astype(np.float32) for width in (12, 8))
    found = kv_ceiling.fit(x, y)
    assert max(found.r2_keys, found.r2_values) < 0.1
    planted = x @ generator.standard_normal((12, 8)).astype(np.float32) + 3
    exact = kv_ceiling.fit(x, planted)
    assert min(exact.r2_keys, exact.r2_values) > 0.9999
    np.testing.assert_allclose(np.concatenate(exact(x[:5]), axis=1), planted[:5], atol=1e-3)


def test_what_can_t_be_tested_is_named(base: Path, tmp_path: Path) -> None:
    class Recurrent:
        model: Any = None

    with pytest.raises(DttError, match="Recurrent: its attention inputs can't be reached"):
        kv_ceiling.attentions(Recurrent())
    wide = Path(write_tokens(tmp_path / "wide.safetensors", width=48))
    with pytest.raises(DttError, match="has rows of width 48"):
        kv_ceiling.ceiling(str(base), str(base), wide)
