"""Attacks on tiny models: what exists is found, what does not exist is not claimed, and a run can be cut anywhere."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.attack import run as run_module
from dtt_plugin.attack.benchmark import load_benchmark
from dtt_plugin.attack.options import AttackOptions
from dtt_plugin.attack.run import attack
from dtt_plugin.cli import main
from dtt_plugin.data.suffixes import ARM_FACTS, other_facts, read_attacks, write_attacks
from dtt_plugin.errors import DttError
from tests import conftest
from tests.attack.planted import SIGN, planted
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from dtt_plugin.attack.search import begin  # noqa: E402  it needs torch

TEXT_METHODS = ("gcg", "random-search", "universal")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return planted(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def deaf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return planted(tmp_path_factory.mktemp("deaf") / "deaf", gain=0.0)


@pytest.fixture
def options(model: str, tmp_path: Path) -> AttackOptions:
    return AttackOptions(model, tmp_path / "a.jsonl", records="0:3", steps=12, dtype="float32")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rates(model: str, path: Path, *, limit: int | None = None, **arguments: Any) -> dict[str, Any]:
    """Evaluate a file of attacks; returns lm-eval's results of the task."""
    results = conftest.evaluate(
        "dtt_hf",
        {"pretrained": model, "dtype": "float32", **arguments},
        metadata={"attacks": str(path)},
        tasks=["injection_demo_adaptive"],
        limit=limit,
    )
    return {**results["results"]["injection_demo_adaptive"], "config": results["configs"]["injection_demo_adaptive"]}


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_a_suffix_that_exists_is_found_and_lm_eval_confirms_it(method: str, options: AttackOptions, model: str) -> None:
    done = attack(replace(options, method=method)).file
    assert done.finished
    found = done.search["hits"] if done.search else [suffix.hit for suffix in done.suffixes]
    assert found == [True, True, True]
    assert all(SIGN in (suffix.suffix or "") for suffix in done.suffixes)
    result = rates(model, options.out, limit=3)
    assert result["hacked_adaptive,none"] == 1.0
    assert result["hacked_worst,none"] == 1.0
    assert result["hacked_max,none"] == result["hacked_any,none"] == 0.0, "the static attacks do nothing to this model"


@pytest.mark.parametrize("method", [*TEXT_METHODS, "soft"])
def test_where_no_suffix_exists_none_is_claimed(method: str, options: AttackOptions, deaf: str) -> None:
    done = attack(replace(options, model=deaf, method=method, steps=5)).file
    found = done.search["hits"] if done.search else [suffix.hit for suffix in done.suffixes]
    assert found == [False, False, False]
    if method != "soft":
        assert rates(deaf, options.out, limit=3)["hacked_worst,none"] == 0.0


def test_vectors_reach_what_text_reaches_and_are_no_text(options: AttackOptions, model: str) -> None:
    done = attack(replace(options, method="soft", steps=200)).file
    assert [suffix.hit for suffix in done.suffixes] == [True, True, True]
    assert [suffix.suffix for suffix in done.suffixes] == [None, None, None]
    with pytest.raises(DttError, match="holds no suffix"):
        rates(model, options.out)


def test_a_universal_suffix_is_written_for_the_other_records_only(options: AttackOptions) -> None:
    done = attack(replace(options, method="universal")).file
    assert [suffix.record_id for suffix in done.suffixes] == list(range(3, 48))
    assert done.search is not None
    assert done.search["records"] == [0, 1, 2]
    assert len({suffix.suffix for suffix in done.suffixes}) == 1


def test_gcg_needs_fewer_steps_than_chance(options: AttackOptions) -> None:
    steps = {}
    for method in ("gcg", "random-search"):
        out = options.out.with_name(f"{method}.jsonl")
        done = attack(replace(options, method=method, out=out, seed=1)).file
        steps[method] = sum(suffix.steps or 0 for suffix in done.suffixes)
    assert steps["gcg"] <= steps["random-search"]


@pytest.mark.parametrize("method", ["gcg", "universal", "soft", "continuation"])
def test_a_run_that_was_interrupted_resumes_to_the_same_bytes(
    method: str, options: AttackOptions, deaf: str, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under = tokens if method == "continuation" else None
    whole = replace(options, model=deaf, method=method, steps=12, tokens=under)
    attack(whole)
    cut = replace(whole, out=options.out.with_name("cut.jsonl"))
    name = "_soft" if method == "soft" else "_told"
    plain = getattr(run_module._Run, name)
    calls = []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 if method == "soft" else len(calls) in (5, 17):
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return plain(self, *arguments)

    monkeypatch.setattr(run_module._Run, name, interrupted)
    assert not attack(cut).file.finished
    assert cut.out.with_name("cut.jsonl.state").is_file() == (method != "soft")
    assert not read_attacks(cut.out).finished
    cut = replace(cut, resume=True)
    for _ in range(2):
        attack(cut)
    assert cut.out.read_bytes() == whole.out.read_bytes()
    assert sorted(path.name for path in cut.out.parent.glob("*.jsonl*")) == ["a.jsonl", "cut.jsonl"]


def test_resuming_what_was_not_begun_begins_it(options: AttackOptions, deaf: str) -> None:
    whole = replace(options, model=deaf, records="0:2", steps=2)
    attack(whole)
    fresh = replace(whole, out=options.out.with_name("fresh.jsonl"), resume=True)
    progress = begin([1] * 10, "another").to_json()
    fresh.out.with_name("fresh.jsonl.state").write_text(json.dumps({"records": [0], "progress": progress}))
    attack(fresh)
    assert fresh.out.read_bytes() == whole.out.read_bytes()
    assert sorted(path.name for path in fresh.out.parent.iterdir()) == ["a.jsonl", "fresh.jsonl"]


def test_a_finished_run_goes_on_with_more_records(options: AttackOptions, deaf: str) -> None:
    whole = replace(options, model=deaf, records="0:2", steps=2, method="random-search")
    attack(whole)
    parts = replace(whole, out=options.out.with_name("parts.jsonl"))
    attack(replace(parts, records="0:1"))
    assert [one.record_id for one in attack(replace(parts, resume=True)).file.suffixes] == [0, 1]
    assert parts.out.read_bytes() == whole.out.read_bytes()


def test_a_state_that_a_kill_left_behind_is_not_taken_for_the_next_records(options: AttackOptions, deaf: str) -> None:
    whole = replace(options, model=deaf, records="0:2", steps=3)
    attack(whole)
    cut = replace(whole, out=options.out.with_name("cut.jsonl"), resume=True)
    done = read_attacks(whole.out)
    first = replace(done, finished=False, suffixes=done.suffixes[:1], flops=done.suffixes[0].flops)
    write_attacks(cut.out, first)
    progress = begin([1] * 10, "another").to_json()
    cut.out.with_name("cut.jsonl.state").write_text(json.dumps({"records": [0], "progress": progress}))
    attack(cut)
    assert cut.out.read_bytes() == whole.out.read_bytes()


def test_the_same_options_give_the_same_bytes_and_another_seed_others(options: AttackOptions) -> None:
    one = replace(options, records="0", steps=4, method="random-search")
    texts = []
    for name, seed in (("b", 0), ("c", 0), ("d", 1)):
        out = options.out.with_name(name)
        texts.append(attack(replace(one, out=out, seed=seed)).file.suffixes[0].suffix)
    assert texts[0] == texts[1] != texts[2]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return Path(write_tokens(tmp_path / "t.safetensors", width=32, norm=3.0))


@pytest.mark.parametrize("defense", [None, "none", "tokens+reminder", "sandwich"])
def test_the_file_names_the_arm_as_the_evaluation_does(
    defense: str | None, options: AttackOptions, tokens: Path, model: str
) -> None:
    attacked = attack(replace(options, records="0", steps=1, tokens=tokens, defense=defense)).file
    arguments: dict[str, Any] = {"tokens": str(tokens), **({"defense": defense} if defense else {})}
    from dtt_plugin.model_wrappers.hf import DttHF

    evaluated = DttHF(model, dtype="float32", **arguments).get_model_info()["dtt_plugin"]
    assert attacked.arm is not None
    assert set(ARM_FACTS) <= attacked.arm.keys()
    assert other_facts(attacked.arm, evaluated) == []
    assert other_facts(attacked.arm, {**evaluated, "defense": "none", "tokens_sha256": "0"}) != []
    assert other_facts(None, evaluated) == list(ARM_FACTS)


@pytest.mark.parametrize("defense", ["spotlight_datamark", "spotlight_encode", "reminder+spotlight_encode"])
def test_defenses_that_rewrite_the_data_are_refused_by_name(defense: str, options: AttackOptions) -> None:
    name = defense.rpartition("+")[2]
    with pytest.raises(DttError, match=f"{name} rewrites the untrusted data.* as a transferred attack"):
        attack(replace(options, defense=defense))
    assert not options.out.exists()


def test_defenses_that_stand_around_the_data_are_attacked(options: AttackOptions) -> None:
    for defense in ("spotlight_delimit", "isolation", "incontext", "instructional"):
        out = options.out.with_name(defense)
        assert attack(replace(options, defense=defense, out=out, records="0", steps=1)).file.finished


@pytest.mark.parametrize("method", ["continuation", "cancel"])
def test_attacks_on_the_tokens_follow_them_to_full_strength(method: str, options: AttackOptions, tokens: Path) -> None:
    wanted = replace(options, method=method, records="0:2", steps=25, tokens=tokens, start="naive")
    done = attack(wanted).file
    assert len(done.suffixes) == 2
    if method == "continuation":
        assert [suffix.hit for suffix in done.suffixes] == [True, True]
        along = replace(wanted, along=(tokens,), out=options.out.with_name("along.jsonl"))
        assert [suffix.hit for suffix in attack(along).file.suffixes] == [True, True]
    with pytest.raises(DttError, match="attacks DefensiveTokens"):
        attack(replace(wanted, tokens=None, out=options.out.with_name("none.jsonl")))


def test_the_results_say_which_attack_on_which_arm(options: AttackOptions, model: str) -> None:
    attack(replace(options, records="0:2"))
    result = rates(model, options.out)
    facts = result["config"]["metadata"]["attack"]
    assert facts["name"] == "gcg@lite-12"
    assert facts["arm"]["defense"] == "none"
    assert facts["n_left_out"] == 46
    assert facts["steps_to_hit"].keys() == {"0", "1"}
    assert all(isinstance(steps, int) for steps in facts["steps_to_hit"].values())


def test_the_command_prints_what_was_found(options: AttackOptions, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attack", options.model, "--records", "0:2", "--steps", "20", "--out", str(options.out), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["attack"] == "gcg@lite-20"
    assert report["hit in the optimiser"] == report["records"] == 2
    assert report["flops"] > 0
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_bad_input_is_told_in_a_sentence(options: AttackOptions, tmp_path: Path, tokens: Path) -> None:
    bad: dict[str, dict[str, Any]] = {
        "--method best is not possible": {"method": "best"},
        "--records 60 chooses none of the 48 records": {"records": "60"},
        "--records x is not possible": {"records": "x"},
        "--task hellaswag can't be attacked": {"task": "hellaswag"},
        "needs a token file": {"defense": "tokens"},
        "choose fewer with --records": {"method": "universal", "records": ":"},
        "transfer them first": {"tokens": Path(write_tokens(tmp_path / "wide.safetensors", width=48))},
        "given with --method continuation only": {"along": (tokens,)},
    }
    for sentence, changed in bad.items():
        with pytest.raises(DttError, match=sentence):
            attack(replace(options, **changed))
        options.out.unlink(missing_ok=True)
    options.out.write_text("no attacks\n")
    with pytest.raises(DttError, match=re.escape(options.out.name)):
        attack(replace(options, resume=True))
    options.out.unlink()
    attack(replace(options, records="0", steps=1))
    with pytest.raises(DttError, match="begun with another budget"):
        attack(replace(options, records="0", steps=2, resume=True))


def test_memory_that_is_too_small_halves_the_batch_once_and_then_names_the_setting(
    options: AttackOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtt_plugin.attack.objective import Objective

    plain = Objective._behind
    sizes: list[int] = []

    def small(self: Any, past: Any, vectors: Any) -> Any:
        sizes.append(len(vectors))
        if len(vectors) > limit:
            raise torch.OutOfMemoryError("no")
        return plain(self, past, vectors)

    monkeypatch.setattr(Objective, "_behind", small)
    options = replace(options, records="0", steps=2, positions_at_once=64)
    limit = 2
    attack(options)
    assert max(sizes) > limit
    limit = 1
    with pytest.raises(DttError, match=r"Out of memory .* --positions-at-once"):
        attack(replace(options, out=options.out.with_name("b")))
    limit = 0
    with pytest.raises(DttError, match="already for one prompt"):
        attack(replace(options, out=options.out.with_name("c")))


def test_quantised_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt_plugin.attack import arm
    from dtt_plugin.training.chat_model import load_chat_model as loaded

    def quantised(*arguments: Any, **options: Any) -> Any:
        chat = loaded(*arguments, **options)
        chat.model.hf_quantizer = object()
        return chat

    monkeypatch.setattr(arm, "load_chat_model", quantised)
    folder = str(make_checkpoint(tmp_path / "tiny"))
    with pytest.raises(DttError, match="quantised weights, which give an attack no gradient"):
        attack(AttackOptions(folder, tmp_path / "a.jsonl"))


def test_a_model_that_transformers_can_not_load_is_refused_by_class(tmp_path: Path) -> None:
    """For instance one that only vLLM has."""
    folder = make_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "only_in_vllm"}))
    with pytest.raises(DttError, match="can't be loaded as a causal language model"):
        attack(AttackOptions(str(folder), tmp_path / "a.jsonl"))
    assert not (tmp_path / "a.jsonl").exists()


def test_a_benchmarks_records_are_those_of_its_task() -> None:
    benchmark = load_benchmark("injection_demo")
    assert len(benchmark.records) == 48
