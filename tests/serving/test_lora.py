"""DefensiveTokens as a LoRA of the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.cli import main
from dtt_plugin.tokens.files import load_tokens
from tests.bake_helpers import load
from tests.checkpoints import SPECIAL_TOKENS, make_checkpoint
from tests.conftest import write_tokens


def test_peft_computes_the_baked_checkpoints_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    special = (*(f"<|reserved_{i}|>" for i in range(12)), *SPECIAL_TOKENS)
    base = make_checkpoint(tmp_path / "base", special=special, dtype="float32")
    file = write_tokens(tmp_path / "t.safetensors", width=32)
    arguments = ["convert", file, str(tmp_path / "lora"), "--to", "lora", "--model", str(base), "--json"]
    assert main(arguments) == 0
    ids = json.loads(capsys.readouterr().out)["token_ids"]
    baked = load(bake(str(base), load_tokens(file), tmp_path / "baked", BakeOptions(reuse_reserved=True)).folder)
    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "lora")).eval()
    assert not any(path.stat().st_size > 1 << 20 for path in (tmp_path / "lora").iterdir())
    with torch.no_grad():
        prompt = torch.tensor([[*ids, 5, 6, 7]])
        torch.testing.assert_close(adapted(prompt).logits, baked(prompt).logits, rtol=0, atol=1e-4)
        assert torch.equal(adapted(prompt[:, 5:]).logits, load(base)(prompt[:, 5:]).logits)
    template = (tmp_path / "lora" / "chat_template.jinja").read_text()
    assert template == (tmp_path / "baked" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("architecture", "reserved", "message"),
    [
        ("MistralForCausalLM", 12, "is a MistralForCausalLM, whose class in vLLM takes no LoRA of its embedding"),
        ("LlamaForCausalLM", 3, "has 3 free ids and 5 are needed"),
    ],
)
def test_what_can_not_be_adapted_is_refused_before_anything_is_written(
    architecture: str, reserved: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(
        tmp_path / "base", special=(*(f"<|reserved_{i}|>" for i in range(reserved)), *SPECIAL_TOKENS)
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    file = write_tokens(tmp_path / "t.safetensors", width=32)
    assert main(["convert", file, str(tmp_path / "lora"), "--to", "lora", "--model", str(base)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
    assert main(["convert", file, str(tmp_path / "lora"), "--to", "lora"]) == 2
    assert "need each other" in capsys.readouterr().err
