"""`dtt bake`, `dtt inspect` and `dtt cache` as commands."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin import cli
from dtt_plugin.bake import MANIFEST, altered_since, is_defended_checkpoint, read_manifest
from dtt_plugin.bake.manifest import fingerprint
from dtt_plugin.checkpoint.tensors import write_safetensors
from dtt_plugin.tokens.files import save_adapter, save_tokens, save_upstream_json
from tests.bake_helpers import random_tokens, tiny


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny(tmp_path / "base")
    save_tokens(tmp_path / "tokens.safetensors", random_tokens(32))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    code = cli.main([*map(str, arguments), "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out) if output.out else output.err


def test_bake_then_inspect_then_alter(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "baked"
    code, report = run(capsys, "bake", files / "base", "--tokens", files / "tokens.safetensors", "--out", out)
    assert (code, report["verified"], report["untied"], len(report["token_ids"])) == (0, True, True, 5)
    code, found = run(capsys, "inspect", out)
    assert code == 0
    assert found["what"] == "defended checkpoint"
    assert (found["base_model"], found["method"], found["k"]) == ("base", "random", 5)
    assert (found["default"], found["altered"], found["verified_when_baked"]) == ("on", "", True)
    assert found["tokens_sha256"] == random_tokens(32).digest
    (out / "chat_template.jinja").write_text("{{ messages }}")
    code, found = run(capsys, "inspect", out)
    assert (code, found["altered"]) == (1, "chat_template.jinja was changed")


def test_default_off_and_no_verify_are_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tokens", files / "tokens.safetensors", "--out", files / "baked", "--default-off", "--no-verify")
    assert run(capsys, "bake", files / "base", *options)[0] == 0
    found = run(capsys, "inspect", files / "baked")[1]
    assert found["default"] == "off: a plain server is undefended"
    assert found["verified_when_baked"] is False


def test_bad_input_is_one_sentence_and_exit_code_2(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("bake", files / "base", "--tokens", files / "missing", "--out", files / "baked"),
        ("bake", files / "none", "--tokens", files / "tokens.safetensors", "--out", files / "baked"),
        ("inspect", files / "missing"),
        ("inspect", files / "base" / "model.safetensors"),
        ("inspect", files / "base" / "tokenizer_config.json"),
    ):
        code, sentence = run(capsys, *arguments)
        assert code == 2
        assert sentence.count("\n") == 1
        assert sentence.startswith(f"dtt {arguments[0]}: ")
    assert not is_defended_checkpoint(files / "baked")


def damaged(manifest: dict[str, Any]) -> Iterator[Any]:
    for name in ("tokens", "base_model", "token_ids", "changed_tensors", "default_on", "files", "format"):
        yield {key: value for key, value in manifest.items() if key != name}
        yield manifest | {name: [1]}
    yield manifest | {"files": dict.fromkeys(manifest["files"], 1)}
    yield manifest | {"changed_tensors": {"x": 1}}
    yield manifest | {"tokens": {}}
    yield [manifest]


def test_a_damaged_manifest_is_one_sentence(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "baked"
    run(capsys, "bake", files / "base", "--tokens", files / "tokens.safetensors", "--out", out)
    whole = json.loads((out / MANIFEST).read_text())
    seen = 0
    for manifest in damaged(whole):
        if manifest == whole | {"token_ids": [1]}:
            continue
        (out / MANIFEST).write_text(json.dumps(manifest))
        code, sentence = run(capsys, "inspect", out)
        assert (code, sentence.count("\n")) == (2, 1), manifest
        assert sentence.startswith(f"dtt inspect: {out / MANIFEST} ")
        seen += 1
    assert seen == 17


def test_an_unreadable_file_is_one_sentence(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("no file at hand that can be opened and not read")
    assert run(capsys, "inspect", "/proc/self/mem") == (
        2,
        "dtt inspect: /proc/self/mem can't be read: Input/output error.\n",
    )


def test_one_shard_of_several_is_no_model_to_bake(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tiny(files / "sharded", shards=2) / "model-00001-of-00002.safetensors"
    code, sentence = run(capsys, "bake", shard, "--tokens", files / "tokens.safetensors", "--out", files / "baked")
    assert (code, sentence) == (
        2,
        f"dtt bake: {shard} is one of several weight files; give their folder, {files / 'sharded'}.\n",
    )


def test_a_path_that_is_not_utf8_is_one_sentence(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(os.fsdecode(os.fsencode(files) + b"/\xff"))
    try:
        (files / "base").rename(base)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    code, sentence = run(capsys, "bake", base, "--tokens", files / "tokens.safetensors", "--out", files / "baked")
    assert (code, sentence) == (2, f"dtt bake: {str(base)!r} is not a path in UTF-8; rename it.\n")
    assert not (files / "baked").exists()


def test_token_files_alignments_and_models_are_told_apart(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "inspect", files / "tokens.safetensors")[1]
    assert (found["what"], found["k"], found["width"]) == ("token file", 5, 32)
    assert np.allclose(found["norms"], np.linalg.norm(random_tokens(32).rows, axis=1), rtol=1e-5)
    save_upstream_json(files / "published.json", {"a": np.ones((5, 8), np.float32), "b": np.ones((2, 4), np.float32)})
    found = run(capsys, "inspect", files / "published.json")[1]
    assert (found["models"], found["tokens"]["b"][:5]) == (2, "2 x 4")
    assert run(capsys, "inspect", files / "published.json", "--tokens-model", "a")[1]["norms"][0] == 8**0.5
    metadata = {"format": "dtt.alignment/1", "source_model": "s", "residual": "0.25"}
    write_safetensors(files / "w.safetensors", {"W": np.ones((4, 6), np.float32)}, metadata)
    found = run(capsys, "inspect", files / "w.safetensors")[1]
    assert (found["what"], found["source_width"], found["residual"]) == ("alignment file", 4, 0.25)
    assert run(capsys, "inspect", files / "base")[1]["what"] == "model without DefensiveTokens"
    save_adapter(files / "adapter", random_tokens(32))
    found = run(capsys, "inspect", files / "adapter")[1]
    assert (found["what"], found["sha256"]) == ("prompt-tuning adapter", random_tokens(32).digest)


def test_cache_lists_and_prunes(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtt_plugin.bake import bake_cached

    monkeypatch.setenv("DTT_CACHE_DIR", str(files / "cache"))
    assert run(capsys, "cache", "list")[1]["entries"] == []
    for seed in (1, 2):
        bake_cached(str(files / "base"), random_tokens(32, seed=seed))
    listed = run(capsys, "cache", "list")[1]
    assert [row["base_model"] for row in listed["entries"]] == ["base"] * 2
    assert listed["disk_bytes"] > 0
    assert len(run(capsys, "cache", "prune", "--keep", "1")[1]["removed"]) == 1
    damaged = bake_cached(str(files / "base"), random_tokens(32, seed=3))
    (damaged / MANIFEST).write_text("{")
    assert run(capsys, "cache", "list")[1]["entries"][0]["base_model"] == "damaged"
    assert bake_cached(str(files / "base"), random_tokens(32, seed=3)) == damaged
    assert not altered_since(damaged, read_manifest(damaged))
    (damaged / MANIFEST).write_text("{")
    assert len(run(capsys, "cache", "prune", "--keep", "1")[1]["removed"]) == 1
    assert run(capsys, "cache", "prune", "--older-than", "1")[1]["removed"] == []
    assert len(run(capsys, "cache", "prune")[1]["removed"]) == 1
    assert run(capsys, "cache", "prune", "--keep", "-1")[0] == 2


@pytest.fixture(scope="module")
def baked_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dtt_plugin.bake import bake

    folder = tmp_path_factory.mktemp("once")
    bake(str(tiny(folder / "base", shards=2)), random_tokens(32), folder / "baked")
    return folder / "baked"


@pytest.fixture
def baked(baked_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(baked_once, tmp_path / "baked")
    return tmp_path / "baked"


def below(put: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Put something into a new folder."""

    def make_folder_and_put(path: Path) -> None:
        path.parent.mkdir()
        put(path)

    return make_folder_and_put


def add_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


ADDED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a link to a folder": ("additional_chat_templates", lambda path: path.symlink_to(path.parent.parent)),
    "a link to a file": ("x.jinja", lambda path: path.symlink_to(path.parent / "config.json")),
    "a dangling link": ("additional_chat_templates", lambda path: path.symlink_to("/none/at/all")),
    "a link to itself": ("loop", lambda path: path.symlink_to("loop")),
    "a pipe": ("tokenizer.model", os.mkfifo),
    "a socket": ("s", add_socket),
    "an empty folder": ("empty/", lambda path: path.mkdir()),
    "a manifest below": ("sub/dtt_checkpoint.json", below(lambda path: path.write_text("{}"))),
    "a hidden file": (".hidden/.x", below(lambda path: path.write_text(""))),
    "a link in a folder": ("sub/link", below(lambda path: path.symlink_to("/"))),
    "a pipe among the weights": ("zz.safetensors", os.mkfifo),
}


@pytest.mark.parametrize("what", ADDED)
def test_whatever_was_added_is_found(what: str, baked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "inspect", baked)[0] == 0
    name, add = ADDED[what]
    add(baked / name)
    code, found = run(capsys, "inspect", baked)
    assert (code, found["altered"]) == (1, f"{name} was added")


def test_something_else_in_a_files_place_is_a_change(baked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, put in (("README.md", os.mkfifo), ("tokenizer.json", os.mkdir)):
        (baked / name).unlink()
        put(baked / name)
    (baked / "generation_config.json").unlink()
    (baked / "generation_config.json").symlink_to("/none/at/all")
    code, found = run(capsys, "inspect", baked)
    assert code == 1
    assert "README.md was changed" in found["altered"]
    assert "tokenizer.json is missing" in found["altered"]
    assert "tokenizer.json/ was added" in found["altered"]
    assert "generation_config.json is missing" in found["altered"]


INDEX = "model.safetensors.index.json"
ODD_INDICES: tuple[Any, ...] = (
    {}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"x": 1}},
    {"weight_map": {"x": []}},
    {"weight_map": {"x": "none.safetensors"}}, {"weight_map": {"x": "a\0b"}}, {"weight_map": {"x": "y" * 300}}, [],
    {"weight_map": {"x": "../base/model-00001-of-00002.safetensors"}}, {"weight_map": {"x": "/etc/passwd"}},
    {"weight_map": {"x": "config.json"}},
)  # fmt: skip


@pytest.mark.parametrize("consistent", [True, False])
def test_an_odd_index_is_one_sentence_and_not_followed(
    consistent: bool, baked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in ODD_INDICES:
        (baked / INDEX).write_text(json.dumps(index))
        if consistent:
            manifest = json.loads((baked / MANIFEST).read_text())
            manifest["files"][INDEX] = fingerprint(baked / INDEX)
            (baked / MANIFEST).write_text(json.dumps(manifest))
        code, found = run(capsys, "inspect", baked)
        if consistent:
            assert (code, found.count("\n")) == (2, 1), index
            assert found.startswith("dtt inspect: ")
            assert "passwd is" not in found
        else:
            assert (code, found["altered"]) == (1, f"{INDEX} was changed")


def test_the_default_is_read_from_the_template(baked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((baked / MANIFEST).read_text())
    (baked / MANIFEST).write_text(json.dumps(manifest | {"default_on": False}))
    code, found = run(capsys, "inspect", baked)
    assert (code, found["default"]) == (1, "on")
    assert found["altered"] == f"{MANIFEST} says that the default is off, the chat templates say: on"
    template = baked / "chat_template.jinja"
    template.write_text("{# #}" + template.read_text())
    manifest["files"][template.name] = fingerprint(template)
    (baked / MANIFEST).write_text(json.dumps(manifest))
    code, found = run(capsys, "inspect", baked)
    assert code == 1
    assert "unknown" in found["default"]


def test_files_that_were_only_sampled_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtt_plugin.bake import bake, manifest

    base = tiny(tmp_path / "base", shards=2)
    monkeypatch.setattr(manifest, "_SMALL", 16_000)
    monkeypatch.setattr(manifest, "_SAMPLE_BYTES", 16)
    bake(str(base), random_tokens(32), tmp_path / "baked")
    code, found = run(capsys, "inspect", tmp_path / "baked")
    large = sorted(path.name for path in (tmp_path / "baked").iterdir() if path.stat().st_size > 16_000)
    assert large
    assert (code, found["only_sampled"]) == (0, large)
    assert "bake the base model again" in found["note"]


def test_what_a_file_says_can_not_pass_for_what_was_found(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"what": "defended checkpoint", "k": "99", "altered": "yes", "norms": "0", "licence": "MIT", "a\nk": "7"}
    hostile = "owner/model\x1b]0;PWNED\x07\x1b[2J\x9b2J\nk  99\r\u202e\u200b\U000e0041"
    tokens = replace(random_tokens(32), model=hostile, metadata={**said, "\x1b[8mnote": hostile})
    save_tokens(files / "spoofed.safetensors", tokens)
    code, found = run(capsys, "inspect", files / "spoofed.safetensors")
    assert (code, found["what"], found["k"], len(found["norms"])) == (0, "token file", 5, 5)
    assert (found["licence"], "altered" in found) == ("none known", False)
    assert found["metadata"]["altered"] == "yes"
    assert cli.main(["inspect", str(files / "spoofed.safetensors"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert not set(shown) & {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\u200b", "\U000e0041"}
    assert json.loads(shown)["metadata"]["\x1b[8mnote"] == hostile
    for command in (
        ("inspect", files / "spoofed.safetensors"),
        ("transfer", files / "spoofed.safetensors", "--method", "copy", "--target-model", "a/b", "-o", files / "o"),
        ("convert", files / "spoofed.safetensors", files / "o.json"),
        ("inspect", files / "o.json"),
    ):
        assert cli.main([*map(str, command)]) == 0
        shown = capsys.readouterr().out
        assert not set(shown) & {"\x1b", "\x07", "\r", "\u202e", "\u200b", "\U000e0041"}, command
        assert not any(line.startswith("k  99") for line in shown.splitlines())
    assert cli.main(["inspect", str(files / "spoofed.safetensors"), "--tokens-model", hostile + "?"]) == 2
    shown = capsys.readouterr().err
    assert (shown.count("\n"), "\x1b" in shown) == (1, False)


def test_published_names_can_not_pass_for_facts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("what", "models", "altered", "\x1b[2J")
    save_upstream_json(files / "p.json", dict.fromkeys(names, np.ones((1, 2), np.float32)))
    code, found = run(capsys, "inspect", files / "p.json")
    assert (code, found["what"], found["models"]) == (0, "published tokens", 4)
    assert set(found["tokens"]) == set(names)
