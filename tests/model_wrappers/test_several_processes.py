"""`dtt_vllm` on two engines that Ray starts answers as on one.

lm-eval asks Ray for a GPU for each engine. Ray believes what a cluster says it has, and vLLM's build for processors
looks for none; so it runs for real here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lm_eval, read_samples, write_tokens

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.slow]
RECORDS = 2


@pytest.fixture
def model(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a small model that writes, under tokens; several engines share one NUMA node."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    tokens = write_tokens(tmp_path / "t.safetensors", width=576)
    return {"pretrained": smollm2, "tokens": tokens, "max_model_len": 2048, **engine}


def answers(folder: Path, arguments: dict[str, Any]) -> tuple[list[Any], str]:
    """Return the prompts with their responses, and what was printed."""
    done = lm_eval(
        "--model", "dtt_vllm", "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", "injection_demo", "--limit", str(RECORDS), "--gen_kwargs", "max_gen_toks=24",
        "--log_samples", "--output_path", str(folder), folder=folder.parent, all_tasks=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    samples = read_samples(folder, "injection_demo")
    prompts = [[one["arg_0"] for one in sample["arguments"].values()] for sample in samples]
    return [*zip(prompts, (sample["resps"] for sample in samples), strict=True)], done.stdout + done.stderr


def test_two_engines_answer_as_one(model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    one, _ = answers(tmp_path / "one", model)
    assert len(one) == RECORDS
    assert all(response for _, responses in one for (response,) in responses)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        two, printed = answers(tmp_path / "two", model | {"data_parallel_size": 2})
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert two == one
    assert len({*re.findall(r"dp_replica pid=(\d+)", printed)}) == 2, "an engine each in two processes of Ray"
