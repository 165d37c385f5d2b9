"""Tokens as a PEFT prompt-tuning adapter, read and written by PEFT itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin import cli
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_adapter, save_tokens
from tests.bake_helpers import load, logits_of_rows, random_tokens, tiny

PROMPT = [3, 50, 17, 200, 90, 264]


@pytest.fixture
def peft() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("peft")


def test_peft_computes_with_an_exported_adapter_what_the_tokens_do(tmp_path: Path, peft: Any) -> None:
    torch = pytest.importorskip("torch")
    base, tokens = tiny(tmp_path / "base"), random_tokens(32)
    save_adapter(tmp_path / "adapter", tokens)
    expected = logits_of_rows(load(base), torch.tensor(tokens.rows), PROMPT)
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        got = model(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(got[-len(PROMPT) :], expected[-len(PROMPT) :], atol=1e-4, rtol=0)


def test_an_adapter_that_peft_saved_is_read(tmp_path: Path, peft: Any) -> None:
    base = tiny(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, base_model_name_or_path=str(base))
    model = peft.get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "adapter")
    tokens = load_tokens(tmp_path / "adapter")
    assert (tokens.model, tokens.method, tokens.prompt_format) == (str(base), "trained", "model")
    weight = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    assert tokens.rows.shape == (7, 32)
    assert np.array_equal(tokens.rows, weight)


def test_every_form_converts_to_every_other_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_tokens(32).rows
    model = "meta-llama/Llama-3.1-8B-Instruct"
    tokens = DefensiveTokens(rows, model, "native", "llama3")
    save_tokens(tmp_path / "a.safetensors", tokens)
    chain = ("a.safetensors", "b.json", "c", "d.safetensors")
    for source, target in itertools.pairwise(chain):
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sha256"] == tokens.digest
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert cli.main(["convert", str(tmp_path / "c"), str(tmp_path / "b.json")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_other_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    with pytest.raises(DttError, match=r"is not a prompt-tuning adapter .* \(no adapter_config\.json"):
        load_tokens(tmp_path / "base")
    save_adapter(tmp_path / "adapter", random_tokens(32))
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(DttError, match=r"is not a prompt-tuning adapter .* \(peft_type='LORA'\)"):
        load_tokens(tmp_path / "adapter")
    file.write_text(json.dumps(config | {"num_transformer_submodules": 2}))
    with pytest.raises(DttError, match="decoder-only"):
        load_tokens(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(DttError, match="safe_serialization"):
        load_tokens(tmp_path / "adapter")
