"""Utility: lm-eval's own tasks on local files, with what they need said in a sentence."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.data.records import data_folder
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.utility import local
from tests import conftest
from tests.conftest import our_tasks

GSM8K, IFEVAL = "utility/gsm8k_test.jsonl", "utility/ifeval_joined.parquet"


@pytest.fixture(autouse=True)
def utility_data(request: pytest.FixtureRequest) -> None:
    missing = [name for name in (GSM8K, IFEVAL) if not (data_folder() / name).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {data_folder()}: run `dtt fetch --only utility` or set DTT_DATA_DIR")


def lm_evals(file: str) -> dict[str, Any]:
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(Path(tasks.__file__).parent / file)
    return config


@pytest.mark.parametrize(
    ("name", "file", "n"),
    [("utility_gsm8k", "gsm8k/gsm8k-cot-zeroshot.yaml", 1319), ("utility_ifeval", "ifeval/ifeval.yaml", 541)],
)
def test_everything_but_the_data_is_lm_evals(name: str, file: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_has_punkt", lambda: True)
    task = our_tasks().load([name])["tasks"][name]
    config, theirs = task.config, lm_evals(file)
    for key in ("doc_to_text", "doc_to_target", "filter_list", "metric_list", "generation_kwargs", "process_results"):
        ours = getattr(config, key)
        assert json.dumps(ours, default=str) == json.dumps(theirs.get(key), default=str), key
    assert config.metadata["version"] == theirs["metadata"]["version"]
    assert len(task.eval_docs) == n


def test_right_answers_score_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gsm8k = our_tasks().load(["utility_gsm8k"])["tasks"]["utility_gsm8k"]
    doc = gsm8k.eval_docs[0]
    assert doc["answer"].endswith("18")
    assert gsm8k.process_results(doc, ["18"])["exact_match"] == 1
    assert gsm8k.process_results(doc, ["19"])["exact_match"] == 0

    monkeypatch.setattr(local, "_has_punkt", lambda: True)
    ifeval = our_tasks().load(["utility_ifeval"])["tasks"]["utility_ifeval"]
    no_comma = next(d for d in ifeval.eval_docs if d["instruction_id_list"] == ["punctuation:no_comma"])
    scores = [ifeval.process_results(no_comma, [text])["prompt_level_strict_acc"] for text in ("A word.", "A, word.")]
    assert scores == [True, False]
    numbers = [value for d in ifeval.eval_docs for one in d["kwargs"] for value in one.values()]
    assert not any(isinstance(value, float) for value in numbers), "counts, which lm-eval's rules count with"


def test_prompts_that_need_what_is_not_here_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "_has_punkt", lambda: False)
    with caplog.at_level(logging.WARNING):
        docs = local.ifeval()["train"]
    assert len(docs) == 477
    assert "64 of 541 prompts are left out" in caplog.text
    monkeypatch.setattr(local, "_has_punkt", lambda: True)
    assert len(local.ifeval()["train"]) == 541


def test_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(local, "find_spec", lambda name: None if name == "immutabledict" else found(name))
    with pytest.raises(DttError, match=r"utility_ifeval needs immutabledict.*pip install 'lm_eval\[ifeval\]'"):
        our_tasks().load(["utility_ifeval"])


def test_other_files_than_the_known_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_benchmark(GSM8K)
    (tmp_path / "utility").mkdir()
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    with pytest.raises(DttError, match="dtt fetch --only utility"):
        local.gsm8k()
    lines = [json.dumps(row) for row in [*known[:5], known[5] | {"answer": "#### 0"}, *known[6:]]]
    (tmp_path / GSM8K).write_text("\n".join(lines))
    with pytest.raises(DttError, match="is not the known file"):
        local.gsm8k()
    assert local.gsm8k(allow_modified_data=True)["test"][5]["answer"] == "#### 0"
    (tmp_path / IFEVAL).write_text("no parquet")
    with pytest.raises(DttError, match="can't be read as parquet"):
        local.ifeval()


def test_a_defended_model_is_asked_in_either_role(tiny: str, tiny_tokens: str) -> None:
    prompts = {}
    for role in ("user", "system"):
        results = conftest.evaluate(
            "dtt_hf",
            {"pretrained": tiny, "tokens": tiny_tokens, "lone_user": role, "max_length": 2048},
            tasks=["utility_gsm8k"],
            limit=1,
            apply_chat_template=True,
        )
        prompts[role] = results["samples"]["utility_gsm8k"][0]["arguments"][0][0]
    assert "<|im_start|>user\nQ: Janet" in prompts["user"]
    assert prompts["system"] == prompts["user"].replace("<|im_start|>user", "<|im_start|>system")
