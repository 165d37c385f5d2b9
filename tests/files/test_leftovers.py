"""What a kill leaves behind is never taken for a result, is removed by the next run, and is left alone while in use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtt_plugin import cli
from dtt_plugin.bake import altered_since, bake, bake_cached, cached_checkpoints, prune, read_manifest
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import (
    TEMPORARY_SUFFIX,
    discard,
    remove_leftovers,
    replacing,
    temporary_sibling,
    write_json,
)
from dtt_plugin.tokens.files import load_tokens, save_tokens
from tests.bake_helpers import random_tokens
from tests.checkpoints import change_in_place, make_checkpoint
from tests.killed import killer

MOST_CALLS = 400


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(make_checkpoint(tmp_path / "base", shards=2))


@pytest.fixture
def baked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baked"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_killed_prune_leaves_whole_entries_or_none_and_blocks_nothing(base: str, baked: Path) -> None:
    tokens, calls = random_tokens(32), 0
    with killer(DTT_CACHE_DIR=baked.parent) as kill:
        while True:
            folder = bake_cached(base, tokens)  # heals what the kill before left
            assert not altered_since(folder, read_manifest(folder))
            died = kill.run(calls, "cache", "prune")
            if folder.exists():
                assert not altered_since(folder, read_manifest(folder))
            if not died:
                break
            calls += 1
            assert calls < MOST_CALLS
    assert calls > 14
    assert not folder.exists()
    assert not list(baked.glob(f".*{TEMPORARY_SUFFIX}"))
    assert not names(baked)


def make_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def make_a_file_of(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def make_a_dangling_link_of(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / "dtt_checkpoint.json").unlink(),
    "killed before its state was noted": lambda folder: discard(folder.with_name(f"{folder.name}.state")),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another config": lambda folder: change_in_place(folder / "config.json"),
    "changed weights": lambda folder: change_in_place(folder / "model-00001-of-00002.safetensors"),
    "no weights": lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
    "a file too many": lambda folder: (folder / "chat_template.json").write_text("{}"),
    "a template too many": lambda folder: write_json(folder / "additional_chat_templates" / "rag.jinja", ""),
    "empty": make_empty,
    "a file": make_a_file_of,
    "a dangling link": make_a_dangling_link_of,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_entry_is_shown_pruned_and_baked_again(
    what: str, base: str, baked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = random_tokens(32)
    whole, folder = bake_cached(base, random_tokens(32, seed=2)), bake_cached(base, tokens)
    DAMAGES[what](folder)
    assert {entry.folder: entry.damaged for entry in cached_checkpoints()} == {folder: True, whole: False}
    assert cli.main(["cache", "list"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert bake_cached(base, tokens) == folder
    assert not altered_since(folder, read_manifest(folder))
    DAMAGES[what](folder)
    assert [entry.folder for entry in prune(keep=5, older_than_days=1)] == [folder]
    assert [entry.folder for entry in cached_checkpoints()] == [whole]


def test_a_killed_convert_to_an_adapter_leaves_a_whole_one_or_none(tmp_path: Path) -> None:
    save_tokens(tmp_path / "t.safetensors", random_tokens(32))
    out, calls = tmp_path / "out" / "adapter", 0
    with killer() as kill:
        while kill.run(calls, "convert", tmp_path / "t.safetensors", out):
            if out.exists():
                assert load_tokens(out).digest == random_tokens(32).digest
                shutil.rmtree(out)
            calls += 1
            assert calls < MOST_CALLS
    assert calls > 5
    assert names(out.parent) == {"adapter"}


def test_a_killed_transfer_leaves_nothing_that_the_next_does_not_remove(tmp_path: Path) -> None:
    save_tokens(tmp_path / "t.safetensors", random_tokens(32))
    out, calls, leftovers = tmp_path / "out" / "moved.safetensors", 0, 0
    arguments = ("transfer", tmp_path / "t.safetensors", "--method", "copy", "--target-model", "a/b", "--out", out)
    with killer() as kill:
        while kill.run(calls, *arguments):
            leftovers += bool(out.parent.is_dir() and list(out.parent.glob(".*")))
            out.unlink(missing_ok=True)
            calls += 1
            assert calls < MOST_CALLS
    assert leftovers
    assert names(out.parent) == {"moved.safetensors"}


def test_a_killed_align_leaves_nothing_in_the_cache_that_the_next_does_not_remove(tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("source", "target"))]
    with killer(DTT_CACHE_DIR=tmp_path / "cache") as kill:
        calls = 0
        while kill.run(calls, "align", *models):
            calls += 3
            assert calls < MOST_CALLS
    assert calls > 5
    assert not list((tmp_path / "cache").rglob(".*"))


def test_force_leaves_nothing_of_a_link_that_stood_at_the_name(tmp_path: Path, base: str) -> None:
    bake(base, random_tokens(32), tmp_path / "out" / "old")
    (tmp_path / "out" / "link").symlink_to("old")
    bake(base, random_tokens(32, seed=2), tmp_path / "out" / "link", force=True)
    assert names(tmp_path / "out") == {"old", "link"}
    assert not (tmp_path / "out" / "link").is_symlink()


@pytest.mark.parametrize("seconds", [0, -1e6, 1e9])
def test_leftovers_of_any_age_go_with_the_next_output(tmp_path: Path, seconds: float) -> None:
    for name in (".a.safetensors.x", ".folder.x"):
        left = tmp_path / f"{name}{TEMPORARY_SUFFIX}"
        left.mkdir() if "folder" in name else left.write_text("half")
        os.utime(left, (time.time() + seconds,) * 2)
    (tmp_path / f".link.x{TEMPORARY_SUFFIX}").symlink_to(tmp_path)
    (tmp_path / ".other.tmp").write_text("not ours")
    save_tokens(tmp_path / "b.safetensors", random_tokens(32))
    assert names(tmp_path) == {"b.safetensors", ".other.tmp"}


def test_what_another_process_still_writes_is_left_alone(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from dtt_plugin.files.replacing import replacing, temporary_sibling\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with replacing(path) as file, temporary_sibling(path, folder=True) as folder:\n"
        "    (folder / 'part').write_text('x')\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    assert (folder / 'part').read_text() == 'x'\n"
        "    file.write_text('whole')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out.json")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    in_use = names(tmp_path)
    remove_leftovers(tmp_path)
    write_json(tmp_path / "mine.json", 1)
    assert names(tmp_path) == in_use | {"mine.json"}
    process.communicate("\n")
    assert process.returncode == 0
    assert names(tmp_path) == {"out.json", "mine.json"}
    assert (tmp_path / "out.json").read_text() == "whole"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake", "{base}", "--tokens", "{tokens}", "--out", "relative"],
        ["transfer", "{tokens}", "--method", "copy", "--target-model", "a/b", "--out", "relative.safetensors"],
        ["convert", "{tokens}", "relative"],
    ],
)
def test_in_a_folder_that_was_removed_a_sentence_says_so(arguments: list[str], tmp_path: Path, base: str) -> None:
    save_tokens(tmp_path / "t.safetensors", random_tokens(32))
    filled = [word.format(base=base, tokens=tmp_path / "t.safetensors") for word in arguments]
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        "import os, sys; from dtt_plugin.cli import main; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); "
        "sys.exit(main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", script, str(gone), *filled]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dtt {arguments[0]}: ")
    assert done.stderr.endswith("The current folder was removed; change to another one.\n")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DttError, match=r"out\.json could not be written: "), replacing(tmp_path / "out.json"):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), temporary_sibling(tmp_path / "out", folder=True):
        raise KeyError
    assert not names(tmp_path)


def test_a_name_as_long_as_a_file_system_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120 + ".json")
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]
    discard(path)
    discard(path)
    assert not names(tmp_path)
