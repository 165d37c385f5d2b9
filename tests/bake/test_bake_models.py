"""Baking two real models: exact logits, and real engines that never generate a DefensiveToken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtt_plugin.bake import bake
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.transfer.twin import turn_tokens, write_twin
from tests.bake_helpers import load, logits_of_ids, logits_of_rows, random_tokens, tiny

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["smollm2", "qwen"])
def model(request: pytest.FixtureRequest) -> Path:
    return Path(str(request.getfixturevalue(request.param)))


def ids_of(model: Path, text: str = "Summarise: the quick brown fox.") -> list[int]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids


def test_logits_are_the_base_models(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tokens = random_tokens(open_checkpoint(str(model)).input_embedding().shape[1])
    report = bake(str(model), tokens, tmp_path / "baked")
    size, ids = report.base_rows, ids_of(model)
    base = load(model)
    stored = torch.tensor(tokens.rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    expected, plain = logits_of_rows(base, stored, ids)[:, :size], logits_of_ids(base, ids)[:, :size]
    del base
    baked = load(tmp_path / "baked")
    assert (logits_of_ids(baked, [*report.token_ids, *ids])[:, :size] - expected).abs().max() < 1e-4
    assert (logits_of_ids(baked, ids)[:, :size] - plain).abs().max() < 1e-4


def test_the_twin_answers_as_the_original_does(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tokens = random_tokens(open_checkpoint(str(model)).input_embedding().shape[1], scale=3)
    rotation = write_twin(str(model), tmp_path / "twin")
    ids = ids_of(model)
    base = load(model)
    expected = logits_of_rows(base, torch.tensor(tokens.rows), ids)
    del base
    twin = load(tmp_path / "twin")
    turned = turn_tokens(tokens, rotation, model="twin")
    got = logits_of_rows(twin, torch.tensor(turned.rows), ids)
    copied = logits_of_rows(twin, torch.tensor(tokens.rows), ids)
    assert (got - expected).abs().max() < 2e-2
    assert (copied - expected).abs().max() > 1


SAMPLE = """
    import json, sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        folder, prompt = sys.argv[1], json.loads(sys.argv[2])
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=64)
        both = [SamplingParams(temperature=t, max_tokens=128, ignore_eos=True) for t in (0, 2)]
        for params, n in zip(both, (1, 64)):
            outputs = llm.generate([{"prompt_token_ids": prompt}] * n, params)
            print("IDS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
        chat = llm.chat([{"role": "user", "content": "a <|im_end|> [DefensiveToken0]"}], both[0])
        print("PROMPT", json.dumps(list(chat[0].prompt_token_ids)))
"""


@pytest.mark.engine
def test_real_vllm_never_generates_one(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    tokens = random_tokens(open_checkpoint(str(model)).input_embedding().shape[1])
    report = bake(str(model), tokens, tmp_path / "baked")
    (tmp_path / "sample.py").write_text(textwrap.dedent(SAMPLE))
    prompt = [*report.token_ids, *ids_of(model)]
    output = in_vllm([str(tmp_path / "sample.py"), str(tmp_path / "baked"), str(prompt)], tmp_path)
    greedy, sampled = lines_of(output, "IDS")
    generated = np.array([*greedy, *sampled])
    assert generated.shape == (65, 128)
    assert not np.isin(generated, report.token_ids).any()
    (chat,) = lines_of(output, "PROMPT")
    assert tuple(chat[:5]) == report.token_ids
    assert not set(chat[5:]) & set(report.token_ids)
    harmless = ids_of(model, "a")
    assert chat.count(harmless[0]) == harmless.count(harmless[0])


STOCK = """
    import json, sys
    from vllm import LLM

    if __name__ == "__main__":
        folder, prompt = sys.argv[1], json.loads(sys.argv[2])
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=64)
        params = llm.get_default_sampling_params()  # what a server takes where a request says nothing
        params.temperature, params.max_tokens, params.ignore_eos = 2.0, 256, True
        outputs = llm.generate([{"prompt_token_ids": prompt}] * 64, params)
        print("IDS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.engine
def test_stock_vllm_never_samples_one_with_its_default_parameters(smollm2: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    report = bake(smollm2, random_tokens(576), tmp_path / "baked")
    (tmp_path / "stock.py").write_text(textwrap.dedent(STOCK))
    prompt = [*report.token_ids, *ids_of(Path(smollm2))]
    output = in_vllm([str(tmp_path / "stock.py"), str(tmp_path / "baked"), str(prompt)], tmp_path, plugin=False)
    (sampled,) = lines_of(output, "IDS")
    assert np.array(sampled).shape == (64, 256)
    assert not np.isin(sampled, report.token_ids).any()


SPLIT = """
    import json, sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        folder, prompt, parts = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
        options = {"tensor_parallel_size": parts, "distributed_executor_backend": "mp"}
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=16, **options)
        both = [SamplingParams(temperature=t, max_tokens=128, ignore_eos=True) for t in (0, 2)]
        for params, n in zip(both, (1, 16)):
            outputs = llm.generate([{"prompt_token_ids": prompt}] * n, params)
            print("IDS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.engine
def test_split_over_two_workers_it_answers_the_same_and_never_generates_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that hold half of every matrix each; the 273 rows of the vocabulary don't halve."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = bake(str(tiny(tmp_path / "base", width=128)), random_tokens(128), tmp_path / "baked")
    (tmp_path / "split.py").write_text(textwrap.dedent(SPLIT))
    prompt = [*report.token_ids, 3, 50, 17, 200, 90, 264]
    greedy = []
    for parts in (1, 2):
        arguments = [str(tmp_path / "split.py"), str(tmp_path / "baked"), str(prompt), str(parts)]
        likeliest, sampled = lines_of(in_vllm(arguments, tmp_path / str(parts)), "IDS")
        assert np.array(sampled).shape == (16, 128)
        assert not np.isin([*likeliest, *sampled], report.token_ids).any()
        greedy.append(likeliest)
    assert greedy[0] == greedy[1]


def in_vllm(arguments: list[str], folder: Path, *, plugin: bool = True) -> str:
    """Run a script in a process of its own, with the plugin's entry points, or with no plugin at all."""
    entry = folder / "entry" / "dtt_plugin_entry-0.dist-info"
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: dtt-plugin-entry\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[vllm.general_plugins]\ndtt_plugin = dtt_plugin.vllm_plugin:register\n")
    path = os.pathsep.join([str(REPOSITORY), str(entry.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines_of(output: str, name: str) -> list[Any]:
    return [json.loads(line[len(name) :]) for line in output.splitlines() if line.startswith(name + " ")]
