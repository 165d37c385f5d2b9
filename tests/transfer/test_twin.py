"""A turned twin computes the same function; its hidden space is the original's times R."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.transfer.twin import turn_tokens, write_twin
from tests.bake_helpers import load, logits_of_ids, logits_of_rows, random_tokens, tiny
from tests.checkpoints import write_weights

PROMPT = [3, 50, 17, 200, 90, 264]


@pytest.mark.parametrize("tied", [True, False])
def test_the_twin_computes_the_same_function(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", tied=tied, shards=2)
    rotation = write_twin(str(base_folder), tmp_path / "twin", seed=3)
    base, twin = load(base_folder), load(tmp_path / "twin")
    assert torch.allclose(logits_of_ids(base, PROMPT), logits_of_ids(twin, PROMPT), atol=2e-5)
    before = open_checkpoint(str(base_folder)).input_embedding().read().astype(np.float64)
    after = open_checkpoint(str(tmp_path / "twin")).input_embedding().read()
    np.testing.assert_allclose(after, before @ rotation, atol=1e-6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(32), atol=1e-12)


def test_turned_tokens_do_on_the_twin_what_the_originals_do_and_copies_do_not(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base")
    rotation = write_twin(str(base_folder), tmp_path / "twin")
    base, twin = load(base_folder), load(tmp_path / "twin")
    tokens = random_tokens(32, scale=3)
    turned = turn_tokens(tokens, rotation, model="twin")
    expected = logits_of_rows(base, torch.tensor(tokens.rows), PROMPT)
    assert torch.allclose(logits_of_rows(twin, torch.tensor(turned.rows), PROMPT), expected, atol=5e-5)
    assert not torch.allclose(logits_of_rows(twin, torch.tensor(tokens.rows), PROMPT), expected, atol=0.1)


def test_biases_of_qwen2_are_turned_or_kept(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", dtype="float32")
    tensors = load_file(base_folder / "model.safetensors")
    generator = np.random.default_rng(5)
    for layer in range(2):
        for name, width in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            bias = generator.standard_normal(width).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{name}.bias"] = bias
    write_weights(base_folder, tensors)
    config = json.loads((base_folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (base_folder / "config.json").write_text(json.dumps(config))
    write_twin(str(base_folder), tmp_path / "twin")
    base, twin = load(base_folder), load(tmp_path / "twin")
    assert torch.allclose(logits_of_ids(base, PROMPT), logits_of_ids(twin, PROMPT), atol=5e-5)


def test_rotations_differ_by_seed_and_only_by_seed(tmp_path: Path) -> None:
    base_folder = str(tiny(tmp_path / "base"))
    first, again, other = (write_twin(base_folder, tmp_path / str(place), seed=s) for place, s in enumerate((1, 1, 2)))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_what_cannot_be_turned_is_refused(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base")
    with pytest.raises(DttError, match="dtype='int8' is not possible"):
        write_twin(str(base_folder), tmp_path / "twin", dtype="int8")
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "architectures": ["PhiForCausalLM"]}))
    with pytest.raises(DttError, match="PhiForCausalLM"):
        write_twin(str(base_folder), tmp_path / "twin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
