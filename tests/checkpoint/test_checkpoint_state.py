"""The state of a model: equal for equal contents, another for whatever can change an answer, and never borrowed."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dtt_plugin.checkpoint import state as checkpoint_state
from dtt_plugin.checkpoint.state import DigestNotes, argument_states, state
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.public_names import is_hub_id
from tests.checkpoints import change_in_place, make_checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["read every time", "noted"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose files have settled; with notes even for its small files, or without."""
    if request.param == "noted":
        monkeypatch.setattr(checkpoint_state, "_NOTED_NBYTES", 0)
    made = make_checkpoint(tmp_path / "model")
    for name in ("additional_chat_templates/rag.jinja", "modeling.py", "vocab.tiktoken", "tokenizer.model"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("one")
    (made / "pytorch_model.bin").write_text("one")
    settle(made)
    return made


def settle(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))


FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "config.json",
    "tokenizer.json",
    "additional_chat_templates/rag.jinja",
    "modeling.py",
    "vocab.tiktoken",
    "tokenizer.model",
)


@pytest.mark.parametrize("name", FILES)
def test_a_change_in_place_shows_although_size_and_time_stay(folder: Path, name: str) -> None:
    before = state(str(folder))
    assert state(str(folder)) == before
    change_in_place(folder / name)
    assert state(str(folder)) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_text("new"),
        lambda folder: (folder / "modeling.py").unlink(),
        lambda folder: (folder / "modeling.py").rename(folder / "other.py"),
        lambda folder: shutil.rmtree(folder / "additional_chat_templates"),
    ],
)
def test_a_file_more_less_or_renamed_shows(folder: Path, change: Callable[[Path], object]) -> None:
    before = state(str(folder))
    change(folder)
    assert state(str(folder)) != before


def test_equal_contents_are_one_state_wherever_and_whenever_they_were_written(folder: Path, tmp_path: Path) -> None:
    before = state(str(folder))
    assert state(str(shutil.copytree(folder, tmp_path / "copy"))) == before
    os.link(folder / "model.safetensors", tmp_path / "link")  # as baking does: only the link count changes
    (folder / "README.md").write_text("for people")
    assert state(str(folder)) == before


def test_a_note_is_read_in_place_of_a_large_file_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    file, notes, times = tmp_path / "file", DigestNotes(tmp_path / "notes"), []

    def read() -> str:
        times.append(1)
        return sha256_file(file)

    file.write_text("one")
    notes.digest(file, read)
    assert not notes.folder.exists(), "the file may still change within one tick of its time stamp"
    os.utime(file, (1, 1))
    digest = notes.digest(file, read)
    assert notes.digest(file, read) == digest
    assert len(times) == 2
    (note,) = notes.folder.iterdir()
    note.write_text(note.read_text().replace(digest, "0" * 64))
    assert notes.digest(file, read) == digest
    assert len(times) == 3


def test_a_write_through_a_memory_map_that_was_dirty_already_shows(folder: Path) -> None:
    file = folder / "model.safetensors"
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("a file system in memory has no dirty pages, and keeps no time of such writes")
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[-1] ^= 1  # the page is dirty from here on: further writes leave all times alone
        os.utime(file, (1_000_000_000, 1_000_000_000))
        before = state(str(folder))
        mapped[-1] ^= 2
        assert state(str(folder)) != before


def test_a_note_that_cannot_be_written_costs_nothing_but_time(folder: Path, own_cache: Path) -> None:
    before = state(str(folder))
    shutil.rmtree(own_cache, ignore_errors=True)
    own_cache.write_text("no folder")
    assert state(str(folder)) == before


def test_a_single_file_counts_with_the_settings_beside_it(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = state(str(file))
    (folder / "pytorch_model.bin").write_text("two")
    assert state(str(file)) == before
    change_in_place(folder / "tokenizer.json")
    assert state(str(file)) != before


def test_a_hub_models_state_is_the_commit_that_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"

    def holds(ref: str, commit: str) -> None:
        (repository / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)

    assert state("owner/name") is None
    holds("main", "a" * 40)
    holds("refs/pr/1", "b" * 40)
    assert state("owner/name") == "a" * 40
    assert state("owner/name", "refs/pr/1") == state("owner/name", "b" * 40) == "b" * 40
    assert state("owner/name", "v2") is None
    holds("main", "c" * 40)
    assert state("owner/name") == "c" * 40
    assert state("owner/name", cache_dir=str(tmp_path / "other")) is None
    assert argument_states({"peft": "owner/name", "revision": "refs/pr/1"}, "m") == {"peft": "b" * 40}


ADAPTED: dict[str, Callable[[str], object]] = {
    "peft": str,
    "delta": Path,
    "tokenizer": str,
    "lora_local_path": str,
    "speculative_config": lambda adapter: {"method": "draft", "model": adapter},
    "speculative_config as JSON": lambda adapter: json.dumps({"model": adapter}),
    "lora_modules": lambda adapter: [{"name": "sql", "path": adapter}],
    "lora_modules as text": lambda adapter: f"sql={adapter}",
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_that_was_trained_again_shows_wherever_arguments_name_it(name: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("one")
    arguments = {name: ADAPTED[name](str(adapter)), "dtype": "float32", "max_length": 2048, "parallelize": True}
    before = argument_states(arguments, "m")
    assert len(before) == 1
    change_in_place(adapter / "adapter_model.safetensors")
    assert argument_states(arguments, "m") != before


def test_an_adapter_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_state, "sha256_file", lambda path: path.with_name("gone").read_text())
        for value in (str(tmp_path / "adapter"), json.dumps({"model": str(tmp_path / "adapter")})):
            with pytest.raises(DttError, match=r"gone can't be read \(No such file"):
                argument_states({"peft": value}, "m")


def test_arguments_are_looked_up_in_the_model_too_and_places_to_write_to_are_not(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    (tmp_path / "offload").mkdir()
    arguments = {"subfolder": "sub", "offload_folder": str(tmp_path / "offload"), "cache_dir": str(tmp_path)}
    assert argument_states(arguments, str(folder)).keys() == {"subfolder"}


def test_a_folder_of_the_same_name_where_one_stands_does_not_hide_that_in_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (folder, tmp_path / "here"):
        (place / "same").mkdir(parents=True)
        (place / "same" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    states = [argument_states({"subfolder": "same"}, str(folder))]
    for place in (folder, tmp_path / "here"):
        change_in_place(place / "same" / "config.json")
        states.append(argument_states({"subfolder": "same"}, str(folder)))
    assert len({found["subfolder"] for found in states}) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("owner/_name.v2", True),
        ("gpt2", False),
        ("./model", False),
        ("../model", False),
        ("~/model", False),
        ("/model", False),
        ("a/b/c", False),
        ("owner/", False),
        ("owner/name\n", False),
        ("", False),
    ],
)
def test_a_hub_id_is_told_by_its_form(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
