"""A real vLLM engine on a real model, through the real lm_eval command."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.demo import TOKENS
from tests.conftest import METRICS, read_results, read_samples

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ENGINE = "dtype=float32,max_model_len=2048,enforce_eager=True"


def evaluate(run: Callable[..., Any], out: Path, model: str, arguments: str, *more: str) -> list[dict[str, Any]]:
    result = run(
        "--model", model, "--model_args", arguments, "--tasks", "alpacafarm_injection", "--limit", "4",
        "--gen_kwargs", "max_gen_toks=16", "--log_samples", "--output_path", str(out), *more,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    for metric in METRICS:
        assert re.search(rf"\|{metric} *\|", result.stdout), metric
    return read_samples(out, "alpacafarm_injection")


@pytest.fixture(scope="module")
def undefended(
    smollm2: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[..., Any]], tuple[Path, list[dict[str, Any]]]]:
    """One run of the undefended model for the tests of this module: an engine takes half a minute to start."""
    made: list[tuple[Path, list[dict[str, Any]]]] = []

    def get(run: Callable[..., Any]) -> tuple[Path, list[dict[str, Any]]]:
        if not made:
            out = tmp_path_factory.mktemp("undefended")
            made.append((out, evaluate(run, out, "dtt_vllm", f"pretrained={smollm2},{ENGINE}")))
        return made[0]

    return get


def test_all_metrics_are_printed_and_all_responses_written(
    undefended: Callable[..., Any], lm_eval_command: Callable[..., Any]
) -> None:
    out, samples = undefended(lm_eval_command)
    assert sum(len(sample["resps"]) for sample in samples) == 16
    assert all(isinstance(response, str) for sample in samples for (response,) in sample["resps"])
    config = read_results(out)["config"]
    assert config["model_dtype"] == "torch.float32"
    assert config["dtt_plugin"]["defense"] == "none"


def test_both_wrappers_send_the_same_ids_and_the_defense_reaches_the_engine(
    smollm2: str,
    undefended: Callable[..., Any],
    lm_eval_command: Callable[..., Any],
    tmp_path: Path,
) -> None:
    arguments = f"pretrained={smollm2},dtype=float32,tokens={TOKENS},defense=reminder+tokens"
    vllm = evaluate(
        lm_eval_command, tmp_path / "vllm", "dtt_vllm", f"{arguments},max_model_len=2048,enforce_eager=True"
    )
    hf = evaluate(lm_eval_command, tmp_path / "hf", "dtt_hf", arguments, "--batch_size", "8")

    def ids(samples: list[dict[str, Any]]) -> list[str]:
        return [request["arg_2"]["prompt_ids_sha256"] for sample in samples for request in sample["arguments"].values()]

    assert ids(vllm) == ids(hf)
    assert set(ids(vllm)).isdisjoint(ids(undefended(lm_eval_command)[1]))
    responses = [[response for (response,) in sample["resps"]] for sample in vllm]
    plain = [[response for (response,) in sample["resps"]] for sample in undefended(lm_eval_command)[1]]
    assert responses != plain
