"""A real vLLM engine on a real model, through the real lm_eval command."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.demo.model import MODELS, SMOLLM2
from tests import conftest
from tests.checkpoints import make_checkpoint
from tests.conftest import METRICS, VLLMRun, run_vllm, write_tokens
from tests.model_wrappers.test_early_decision import scores

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_all_metrics_are_printed_and_all_responses_written(undefended_vllm: VLLMRun) -> None:
    for metric in METRICS:
        assert re.search(rf"\|{metric} *\|", undefended_vllm.stdout), metric
    samples = undefended_vllm.samples
    assert sum(len(sample["resps"]) for sample in samples) == 12
    assert all(isinstance(response, str) for sample in samples for (response,) in sample["resps"])
    config = undefended_vllm.results["config"]
    assert config["model_dtype"] == "torch.float32"
    assert config["dtt_plugin"]["defense"] == "none"


def test_both_wrappers_send_the_same_ids_and_the_defense_reaches_the_engine(
    smollm2: str, undefended_vllm: VLLMRun, tmp_path: Path
) -> None:
    arm = {"pretrained": smollm2, "tokens": str(MODELS[SMOLLM2].tokens), "defense": "reminder+tokens"}
    vllm = run_vllm(tmp_path, ",".join(f"{name}={value}" for name, value in arm.items())).samples
    options: dict[str, Any] = {"limit": 3, "gen_kwargs": {"max_gen_toks": 1}}
    hf = conftest.evaluate("dtt_hf", arm | {"dtype": "float32"}, **options)["samples"]["injection_demo"]

    def in_files(samples: list[dict[str, Any]]) -> list[str]:
        return [request["arg_2"]["prompt_ids_sha256"] for sample in samples for request in sample["arguments"].values()]

    assert in_files(vllm) == [facts["prompt_ids_sha256"] for sample in hf for *_, facts in sample["arguments"]]
    assert set(in_files(vllm)).isdisjoint(in_files(undefended_vllm.samples))
    responses = [[response for (response,) in sample["resps"]] for sample in vllm]
    plain = [[response for (response,) in sample["resps"]] for sample in undefended_vllm.samples]
    assert responses != plain


@pytest.mark.parametrize(
    ("task", "limit"),
    [
        pytest.param("injection_demo", True, id="3 records"),
        pytest.param("alpacafarm_injection", False, id="all 832 prompts", marks=pytest.mark.slow),
    ],
)
def test_vllm_gives_the_same_metrics_with_a_fifth_of_the_tokens(
    smollm2: str, undefended_vllm: VLLMRun, tmp_path_factory: pytest.TempPathFactory, task: str, limit: bool
) -> None:
    def run(early: bool) -> VLLMRun:
        folder = tmp_path_factory.mktemp("run")
        return run_vllm(folder, f"pretrained={smollm2},early_decision={early}", task=task, limit=limit)

    whole = undefended_vllm if limit else run(early=False)
    early = run(early=True)
    assert scores(early.results, task) == scores(whole.results, task)
    for one, other in zip(early.samples, whole.samples, strict=True):
        assert {name: one[name] for name in one["metrics"]} == {name: other[name] for name in other["metrics"]}
    facts = [run.results["config"]["dtt_plugin"] for run in (whole, early)]
    least = 2 if limit else 5  # 48 tokens decide no benign response
    assert facts[1]["generated_tokens"] * least <= facts[0]["generated_tokens"]


@pytest.mark.slow
def test_all_prompts_of_the_benchmark_are_answered_beside_the_model_as_from_the_baked_checkpoint(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    base = make_checkpoint(tmp_path / "base", width=64, extra_rows=49152 + 16 - 268, dtype="float32")
    for file in Path(smollm2).glob("*token*"):  # a real vocabulary: a byte a token would make prompts of thousands
        shutil.copy(file, base)
    for file in Path(smollm2).glob("*.jinja"):
        shutil.copy(file, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192, "eos_token_id": 2}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    tokens = write_tokens(tmp_path / "t.safetensors", width=64)
    runs = {}
    for route, more in (("embedding layer", ""), ("baked checkpoint", ",baked=true")):
        (folder := tmp_path / route.split()[0]).mkdir()
        started = time.monotonic()
        runs[route] = run = run_vllm(
            folder,
            f"pretrained={base},tokens={tokens},max_model_len=8192{more}",
            "--gen_kwargs",
            "max_gen_toks=8",
            task="alpacafarm_injection",
            limit=False,
        )
        print(f"{route}: {time.monotonic() - started:.0f} s")
        assert run.results["config"]["dtt_plugin"]["tokens_route"] == route
        assert (tmp_path / "cache" / "baked").exists() == (route == "baked checkpoint")

    def answers(run: VLLMRun) -> list[tuple[str, str]]:
        return [
            (request["arg_2"]["prompt_ids_sha256"], response)
            for sample in run.samples
            for request, (response,) in zip(sample["arguments"].values(), sample["resps"], strict=True)
        ]

    beside, baked = map(answers, runs.values())
    different = sum(one != other for one, other in zip(beside, baked, strict=True))
    print(f"{len(beside)} prompts, {different} answers differ")
    assert len(beside) == 832
    assert different == 0
    assert len({answer for _, answer in beside}) > 100
