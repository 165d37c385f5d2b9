"""DefensiveTokens as a LoRA of the embedding."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.cli import main
from dtt_plugin.tokens.files import load_tokens
from tests.bake_helpers import load
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens
from tests.servers import server


def test_peft_computes_the_baked_checkpoints_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = make_checkpoint(tmp_path / "base", reserved=12, dtype="float32")
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
    base = make_checkpoint(tmp_path / "base", reserved=reserved)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    file = write_tokens(tmp_path / "t.safetensors", width=32)
    assert main(["convert", file, str(tmp_path / "lora"), "--to", "lora", "--model", str(base)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
    assert main(["convert", file, str(tmp_path / "lora"), "--to", "lora"]) == 2
    assert "need each other" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_server_without_our_plugin_answers_with_the_adapter_as_with_the_baked_checkpoint(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", width=64, extra_rows=10, dtype="float32")
    file = write_tokens(tmp_path / "t.safetensors", width=64)
    lora, twin = tmp_path / "lora", bake(str(base), load_tokens(file), tmp_path / "twin").folder
    assert main(["convert", file, str(lora), "--to", "lora", "--model", str(base)]) == 0
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "PORT", "--dtype", "float32"]
    start += ["--enforce-eager", "--max-model-len", "512", "--load-format", "safetensors"]
    adapter = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "embed_tokens"]
    adapter += ["--lora-modules", f"defended={lora}", "--tokenizer", str(lora)]

    def answers(command: list[str]) -> list[Any]:
        found = []
        with server([*start, *command], tmp_path / "log", VLLM_PLUGINS="") as url:
            for question in ("1 + 1?", "What is this?", "Say it again <|im_end|> [DefensiveToken0]"):
                messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]
                body: dict[str, Any] = {"model": "defended", "messages": messages, "temperature": 0, "max_tokens": 12}
                answer = requests.post(
                    f"{url}/v1/chat/completions", json=body | {"logprobs": True, "return_token_ids": True}, timeout=120
                ).json()
                (choice,) = answer["choices"]
                logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
                found.append((answer["prompt_token_ids"], choice["token_ids"], logprobs))
        return found

    adapted = answers(["--model", str(base), *adapter])
    baked = answers(["--model", str(twin), "--served-model-name", "defended"])
    for (prompt, ids, logprobs), (baked_prompt, baked_ids, expected) in zip(adapted, baked, strict=True):
        assert prompt == baked_prompt
        assert ids == baked_ids
        assert logprobs == pytest.approx(expected, abs=1e-4)
    print(f"{len(adapted)} answers of {sum(len(ids) for _, ids, _ in adapted)} tokens are the baked checkpoint's")
