"""Models that were trained with a role of its own for untrusted data, such as Meta-SecAlign's adapters, as arms."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from dtt_plugin.errors import DttError
from tests import conftest
from tests.checkpoints import make_checkpoint
from tests.conftest import plain_task, run_vllm


def lora_adapter(pretrained: str, folder: Path) -> str:
    """Write a LoRA adapter that changes every answer, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return str(folder)


def evaluate(**arguments: Any) -> list[dict[str, Any]]:
    results = conftest.evaluate("dtt_hf", {"dtype": "float32", "max_length": 4096, **arguments})
    samples: list[dict[str, Any]] = results["samples"]["injection_demo"]
    return samples


def contents(samples: list[dict[str, Any]]) -> list[list[str]]:
    messages = [request[2]["messages"] for sample in samples for request in sample["arguments"]]
    return [[message["content"] for message in conversation] for conversation in messages]


def test_an_adapter_with_a_role_of_its_own_runs_on_the_same_records(tiny: str, tmp_path: Path) -> None:
    adapter = lora_adapter(tiny, tmp_path / "adapter")
    plain = evaluate(pretrained=tiny)
    adapted = evaluate(pretrained=tiny, peft=adapter, untrusted_role="input")
    assert [sample["doc_hash"] for sample in adapted] == [sample["doc_hash"] for sample in plain]
    assert contents(adapted) == contents(plain)
    for sample in adapted:
        for prompt, _, facts in sample["arguments"]:
            assert prompt.startswith("<|im_start|>user\n")
            assert "<|im_end|>\n<|im_start|>input\n" in prompt
            assert [message["role"] for message in facts["messages"]] == ["user", "input"]
    same_prompts = evaluate(pretrained=tiny, untrusted_role="input")
    assert [s["arguments"][0][0] for s in same_prompts] == [s["arguments"][0][0] for s in adapted]
    assert [s["resps"] for s in same_prompts] != [s["resps"] for s in adapted], "the adapter answers"


def test_tasks_of_lm_eval_may_be_asked_in_the_trusted_role(tiny: str, tmp_path: Path) -> None:
    task = plain_task(tmp_path)
    options: dict[str, Any] = {"tasks": [task], "limit": None, "apply_chat_template": True}
    prompts = {}
    for role in ("user", "system"):
        results = conftest.evaluate("dtt_hf", {"pretrained": tiny, "lone_user": role}, **options)
        prompts[role] = results["samples"]["plain"][0]["arguments"][0][0]
    assert prompts["user"] == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts["system"] == prompts["user"].replace("user", "system")


@pytest.mark.parametrize("argument", [{"untrusted_role": "system"}, {"lone_user": "assistant"}])
def test_a_role_that_can_not_be_is_refused_before_the_model_is_loaded(argument: dict[str, str]) -> None:
    with pytest.raises(DttError, match=next(iter(argument))):
        get_model("dtt_hf").create_from_arg_obj({"pretrained": "/no/such/model", **argument})


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_runs_an_adapter_with_a_role_of_its_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", width=64, dtype="float32")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    adapter = lora_adapter(str(model), tmp_path / "adapter")
    arguments, lora = f"pretrained={model},untrusted_role=input", f"enable_lora=True,lora_local_path={adapter}"
    adapted = run_vllm(tmp_path, f"{arguments},{lora}")
    plain = run_vllm(tmp_path, arguments)
    for sample in adapted.samples:
        assert "<|im_end|>\n<|im_start|>input\n" in sample["arguments"]["gen_args_0"]["arg_0"]
    assert [s["doc_hash"] for s in adapted.samples] == [s["doc_hash"] for s in plain.samples]
    assert [s["resps"] for s in adapted.samples] != [s["resps"] for s in plain.samples], "the adapter answers"
