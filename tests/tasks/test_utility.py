"""Utility: lm-eval's own tasks on local files, with what they need said in a sentence."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.cli import main
from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.data.records import data_folder
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard import sheets
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.lm_eval_files import read_run, read_runs
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


def written(folder: Path, tiny: str, **arguments: Any) -> Path:
    """Run an injection task and both utility tasks on the tiny model; returns what lm-eval wrote."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    results = conftest.evaluate(
        "dtt_hf",
        {"pretrained": tiny, "max_length": 4096, **arguments},
        tasks=["injection_demo", "utility_gsm8k", "utility_ifeval"],
        apply_chat_template=True,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, own in samples.items():
        tracker.save_results_samples(task_name=task, samples=own)
    return folder


def test_what_a_defense_costs_in_use_stands_in_the_table_over_benchmarks(
    tiny: str, tiny_tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    written(out / "none", tiny)
    written(out / "tokens", tiny, tokens=tiny_tokens)
    samples = next(out.glob("none/*/samples_utility_gsm8k_*.jsonl"))
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [(line["filter"], line["doc_id"]) for line in lines] == [
        ("strict-match", 0), ("strict-match", 1), ("flexible-extract", 0), ("flexible-extract", 1)
    ]  # fmt: skip
    runs, problems = read_runs([out])
    assert problems == []
    assert sorted({run.task for run in runs}) == ["injection_demo", "utility_gsm8k", "utility_ifeval"]
    assert all(run.n == 2 and run.limited for run in runs)
    kept = tmp_path / "kept" / "all.outcomes.json"
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    command = ["leaderboard", str(out), "--export", str(kept), "--html", str(page), "--figures", str(figures)]
    assert main(command) == 0
    assert "Janet" not in kept.read_text(encoding="utf-8")
    assert "Janet" not in page.read_text(encoding="utf-8"), "the browser shows what was attacked"
    assert "ASR against utility" in page.read_text(encoding="utf-8")
    assert list(figures.glob("tradeoff-utility-*.png"))
    shown = []
    for given in (out, kept):
        (suite,) = build(read_runs([given])[0]).suites
        assert suite.measures["utility, GSM8K"] == "utility_gsm8k"
        assert suite.measures["utility, IFEval"] == "utility_ifeval"
        assert suite.benchmarks == ("injection_demo",)
        headers = [sheet.header for sheet in sheets.sheets(build(read_runs([given])[0]))]
        assert ["run", "exact match"] in headers
        assert ["run"] not in headers
        assert [row.arm for row in suite.rows] == ["none", "tokens (random)"]
        assert all(row.measures["utility, GSM8K"].rate.n == 2 for row in suite.rows)
        shown.append(sheets.suite_sheet(suite).rows)
    assert shown[0] == shown[1]

    # What is not as lm-eval wrote it is a sentence.
    lines[2]["exact_match"] = 1.0 - lines[2]["exact_match"]
    samples.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DttError, match="does not belong to"):
        read_run(samples)
    samples.write_text("\n".join(map(json.dumps, lines[:3])))
    with pytest.raises(DttError, match="has 1 samples and"):
        read_run(samples)
    samples.write_text("\n".join(map(json.dumps, [*lines[:2], lines[2] | {"exact_match": "yes"}, lines[3]])))
    with pytest.raises(DttError, match="no exact_match of 0 or 1 for each document"):
        read_run(samples)
    capsys.readouterr()
    assert main(["diff", str(kept), str(kept)]) == 2
