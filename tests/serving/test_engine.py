"""A vLLM engine with token files beside the base model answers as engines of baked checkpoints do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.serving.placing import TokenFile, place
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT, write_tokens

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
GREEDY = {"temperature": 0, "max_tokens": 12, "logprobs": 1}


def answers(engine: dict[str, Any], requests: list[Any], sampling: dict[str, Any] | None = None) -> list[Any]:
    defaults = {"max_model_len": 256, "block_size": 32}
    job = {"engine": defaults | engine, "sampling": sampling or GREEDY, "requests": requests}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if engine.get("tensor_parallel_size", 1) == 1 else "1"
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # two processes on one NUMA node
    command = [sys.executable, "-m", "tests.serving.in_engine", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    return found


class Models:
    """A base model with reserved tokens, two token files, and a baked twin for each."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.base = str(make_checkpoint(folder / "base", width=64, reserved=12, **options))
        self.files = [write_tokens(folder / f"{name}.safetensors", width=64, seed=ord(name)) for name in "ab"]
        self.ids = {p.source.name: list(p.ids) for p in place(self.base, map(TokenFile, self.files)).placed}
        tokens = [load_tokens(file) for file in self.files]
        self.twins = [
            str(bake(self.base, one, folder / f"twin{n}", BakeOptions(reuse_reserved=True)).folder)
            for n, one in enumerate(tokens)
        ]

    @property
    def served(self) -> dict[str, Any]:
        return {"model": self.base, "additional_config": {"dtt": {"tokens": self.files}}}


def only(file: str) -> dict[str, Any]:
    return {"additional_config": {"dtt": {"tokens": [file]}}}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversations_are_answered_as_by_the_baked_checkpoint_and_all_else_is_refused(
    dtype: str, tmp_path: Path
) -> None:
    models = Models(tmp_path)
    chosen: list[Any] = [{}, {"defensive_tokens": "b"}, {"defensive_tokens": None}, {"add_defensive_tokens": False}]
    refused: list[Any] = [
        {"defensive_tokens": "c"},
        {"defensive_tokens": "a", "add_defensive_tokens": False},
        {"plain": "1 + 1"},
        [5, 6, 7],
    ]
    found = answers(models.served | {"dtype": dtype}, [*chosen, *refused[:3], *chosen])
    a, b, none, off = found[:4]
    assert found[7:] == found[:4], "the prefix cache mixes nothing"
    assert a[0][:5] == models.ids["a"]
    assert b[0][:5] == models.ids["b"]
    assert a[0][5:] == b[0][5:] == none[0] == off[0]
    assert none[1:] == off[1:]
    for sentence, part in zip(found[4:7], ("are: a, b, or null", "contradict", "conversations only"), strict=True):
        assert part in sentence
    with pytest.raises(AssertionError, match="takes conversations only"):
        answers(models.served | {"dtype": dtype}, refused[3:])
    # Alone each file has the ids of its twin, and only then do both engines bar the same ids from an answer: beside
    # other files the probabilities are those of a vocabulary that is smaller by these files' ids.
    for file, twin, beside in zip(models.files, models.twins, (a, b), strict=True):
        alone = answers(models.served | {"dtype": dtype} | only(file), [{}, {"defensive_tokens": None}])
        assert alone == answers({"model": twin, "dtype": dtype}, [answer[0] for answer in alone])
        assert alone[0][1] == beside[1]
        assert alone[1][1] == none[1]
    assert a[1] != none[1]


@pytest.mark.slow
def test_no_sampling_brings_a_token(tmp_path: Path) -> None:
    models = Models(tmp_path)
    ids = [i for part in models.ids.values() for i in part]
    sampling: dict[str, Any] = {"temperature": 2, "max_tokens": 200, "top_k": 0, "n": 48, "ignore_eos": True}
    sampling["logit_bias"] = dict.fromkeys(ids, 100.0)
    (answer,) = answers(models.served | {"dtype": "float32"}, [{}], sampling)
    generated = [i for choice in answer[1] for i in choice]
    print(f"{len(generated)} tokens at temperature 2 and logit_bias 100, {len({*generated} & {*ids})} placed")
    assert len(generated) > 6000
    assert not {*generated} & {*ids}


@pytest.mark.slow
def test_penalties_and_log_probabilities_of_the_prompt_are_those_of_the_baked_checkpoint(tmp_path: Path) -> None:
    models = Models(tmp_path)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    sampling = GREEDY | penalties | {"prompt_logprobs": 1}
    (beside,) = answers(models.served | {"dtype": "float32"} | only(models.files[0]), [{}], sampling)
    (baked,) = answers({"model": models.twins[0], "dtype": "float32"}, [beside[0]], sampling)
    assert beside == baked
    assert beside[3][0] is None
    assert beside[3][1:5] == [float("-inf")] * 4, "no DefensiveToken has a probability, in a prompt either"
    assert all(-50 < logprob < 0 for logprob in beside[3][5:])
    (plain,) = answers(models.served | {"dtype": "float32"} | only(models.files[0]), [{}])
    assert plain[1] != beside[1], "the penalties changed something"


@pytest.mark.slow
def test_drafts_from_the_prompt_bring_no_token(tmp_path: Path) -> None:
    models = Models(tmp_path)
    engine = models.served | {"dtype": "float32"}
    sampling = GREEDY | {"max_tokens": 60, "ignore_eos": True}
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    requests: list[Any] = [{}, {"defensive_tokens": "b"}, {"defensive_tokens": None}]
    drafted = answers(engine | {"speculative_config": drafts}, requests, sampling)
    assert [answer[:2] for answer in drafted] == [answer[:2] for answer in answers(engine, requests, sampling)]
    placed = {i for part in models.ids.values() for i in part}
    assert not placed & {i for answer in drafted for generated in answer[1] for i in generated}


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    models = Models(tmp_path)
    chosen: list[Any] = [{}, {"defensive_tokens": "b"}, {"defensive_tokens": None}]
    one, two = (answers(models.served | {"dtype": "float32", "tensor_parallel_size": n}, chosen) for n in (1, 2))
    assert [answer[:2] for answer in one] == [answer[:2] for answer in two]
    for alone, split in zip(one, two, strict=True):
        assert alone[2] == pytest.approx(split[2], abs=1e-3)


_PROGRAM = """
import sys, time
from vllm import LLM

if __name__ == "__main__":
    LLM(sys.argv[1], max_model_len=256, block_size=32, enforce_eager=True)
    print("ready", flush=True)
    time.sleep(600)
"""


def runs(process: Any) -> bool:
    with suppress(pytest.importorskip("psutil").NoSuchProcess):
        return bool(process.is_running() and process.status() != "zombie")
    return False


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_ends_with_the_process_that_started_it_though_that_is_killed(method: str, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    base = make_checkpoint(tmp_path / "base", width=64)
    (tmp_path / "program.py").write_text(_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_WORKER_MULTIPROCESSING_METHOD": method, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(tmp_path / "program.py"), str(base)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        assert any(line == "ready\n" for line in process.stdout), (tmp_path / "log").read_text()[-3000:]
        engines = psutil.Process(process.pid).children(recursive=True)
        assert any("EngineCor" in engine.name() for engine in engines)
    finally:
        process.kill()
        process.wait()
    limit = time.monotonic() + 60
    while (left := [engine for engine in engines if runs(engine)]) and time.monotonic() < limit:
        time.sleep(0.2)
    for engine in left:
        engine.kill()
    assert not left
