"""No run is answered from the cache of another state: an adapter trained again, weights changed in place, damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_model
from transformers import AutoTokenizer

from dtt_plugin.bake import bake_cached
from dtt_plugin.training import labels as labels_module
from dtt_plugin.training.labels import self_labels
from dtt_plugin.training.soft_prompt import SoftPrompt
from tests.bake_helpers import load, random_tokens
from tests.checkpoints import CHAT_TEMPLATE, change_in_place, make_checkpoint
from tests.conftest import evaluate


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train_adapter(base: str, folder: Path, seed: int) -> None:
    """Write a LoRA adapter that changes answers; size and time of its files are always the same."""
    peft = pytest.importorskip("peft")
    model = load(Path(base))
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    for path in folder.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))


def answers(base: str, arguments: dict[str, Any], cache: Path | None) -> list[Any]:
    options: dict[str, Any] = {"use_cache": str(cache)} if cache else {}
    model_args = {"pretrained": base, "dtype": "float32", "max_length": 2048, **arguments}
    results = evaluate("dtt_hf", model_args, limit=1, gen_kwargs={"max_gen_toks": 24}, **options)
    return [sample["resps"] for sample in results["samples"]["injection_demo"]]


def test_an_adapter_trained_again_in_its_folder_gets_its_own_answers(tiny: str, tmp_path: Path) -> None:
    arguments, cache = {"peft": str(tmp_path / "adapter")}, tmp_path / "answers"
    train_adapter(tiny, tmp_path / "adapter", seed=1)
    first = answers(tiny, arguments, cache)
    train_adapter(tiny, tmp_path / "adapter", seed=2)
    second = answers(tiny, arguments, cache)
    assert second == answers(tiny, arguments, None)
    assert second != first


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "weights": ({}, lambda folder: change_in_place(folder / "base" / "model.safetensors")),
    "a template": ({}, lambda folder: change_in_place(folder / "base" / "additional_chat_templates" / "rag.jinja")),
    "tokenizer": ({"tokenizer": "other"}, lambda folder: change_in_place(folder / "other" / "chat_template.jinja")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_changes_although_sizes_and_times_stay(what: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE + "x")
    shutil.copytree(base, tmp_path / "other")
    arguments, change = CHANGES[what]
    arguments = {name: str(tmp_path / value) for name, value in arguments.items()}

    def fingerprint() -> Any:
        create = get_model("dtt_hf").create_from_arg_obj
        return create({"pretrained": str(base), "dtype": "float32", **arguments}).get_model_info()["dtt_plugin"]

    before = fingerprint()
    assert fingerprint() == before
    change(tmp_path)
    after = fingerprint()
    assert after["fingerprint"] != before["fingerprint"]
    key = "argument_states" if arguments else "weights"
    assert after[key] != before[key]


def test_a_state_that_cannot_be_told_equals_no_other(
    tiny: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dtt_plugin.model_wrappers.session.state", lambda *_, **__: None)
    create = get_model("dtt_hf").create_from_arg_obj
    models = [create({"pretrained": tiny, "dtype": "float32"}) for _ in range(2)]
    assert models[0].fingerprint != models[1].fingerprint
    assert "can't be told" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "tokenizer.json",
        "additional_chat_templates/rag.jinja",
        "modeling.py",
        "vocab.tiktoken",
    ],
)
def test_a_baked_checkpoint_is_that_of_the_files_as_they_are_now(name: str, tmp_path: Path) -> None:
    base, tokens = make_checkpoint(tmp_path / "base"), random_tokens(32)
    for extra in ("additional_chat_templates/rag.jinja", "modeling.py", "vocab.tiktoken"):
        (base / extra).parent.mkdir(exist_ok=True)
        (base / extra).write_text("text \n")
    file = base / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    before = bake_cached(str(base), tokens)
    assert bake_cached(str(base), tokens) == before
    stat = (base / name).stat()
    if name == "tokenizer.json":
        file.write_text(file.read_text()[:-1] + "\n")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        change_in_place(base / name)
    assert (base / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert bake_cached(str(base), tokens) != before


def make_labels(model: str, **changed: Any) -> list[list[int]]:
    undefended = SoftPrompt(load(Path(model)), torch.empty(0, 32))
    records: Any = [{"instruction": "Add.", "input": "1 + 1", "output": ""}] * 2
    tokenizer = AutoTokenizer.from_pretrained(model)
    options: dict[str, Any] = {"tokenizer": tokenizer, "new_tokens": 5, "weights": "sha256:0"} | changed
    return self_labels(undefended, lambda *_: [3, 4, 5], records, **options)


@pytest.mark.parametrize(
    "damage", ["", "[1, 2]", "{}", "null", "[[1], [2]]", '{"labels": [[1]], "sha256": "0"}', '{"labels": [[1', "\x00"]
)
def test_damaged_labels_are_made_again(
    damage: str, tiny: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = make_labels(tiny)
    (file,) = (own_cache / "labels").iterdir()
    file.write_text(damage)
    assert make_labels(tiny) == labels
    monkeypatch.setattr(SoftPrompt, "generate", lambda *_, **__: pytest.fail("labels were made"))
    assert make_labels(tiny) == labels
    stored = json.loads(file.read_text())
    stored["labels"][0][0] += 1
    file.write_text(json.dumps(stored))
    with pytest.raises(pytest.fail.Exception, match="labels were made"):
        make_labels(tiny)


def test_labels_of_another_state_are_others_and_only_so_many_are_kept(
    tiny: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "_MOST_ENTRIES", 2)
    for state in ("a", "b", "c"):
        make_labels(tiny, weights=state)
    assert len(list((own_cache / "labels").iterdir())) == 2


def test_labels_that_cannot_be_kept_are_used_all_the_same(
    tiny: str, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.write_text("no folder")
    assert len(make_labels(tiny)) == 2
    assert "can't be kept" in caplog.text
