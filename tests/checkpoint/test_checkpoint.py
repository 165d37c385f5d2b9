"""Reading checkpoints: what is found, what is read, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.alignment import AlignmentOptions, align
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.tensors import read_header
from dtt_plugin.checkpoint.vocabulary import load_vocabulary
from dtt_plugin.cli import align as align_command
from dtt_plugin.cli import main
from dtt_plugin.errors import DttError
from tests.checkpoints import DTYPES, default_vocab_tokens, make_checkpoint, write_weights

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_rows_come_back_as_they_were_stored(tmp_path: Path, dtype: str, shards: int) -> None:
    values = np.random.default_rng(0).standard_normal((268, 32))
    folder = make_checkpoint(tmp_path, dtype=dtype, shards=shards, embedding=values)
    location = open_checkpoint(str(folder)).input_embedding()
    stored = values.astype(DTYPES[dtype])
    assert location.shape == (268, 32)
    np.testing.assert_array_equal(location.read_rows(3, 9), stored[3:9])
    rows = np.array([5, 6, 7, 0, 267, 266])
    np.testing.assert_array_equal(location.read_rows_at(rows), stored[rows])
    np.testing.assert_array_equal(location.read(), stored)


def test_every_tensor_of_every_shard_is_located(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path, shards=4, tied=False)))
    assert len(checkpoint.tensors()) == 21
    assert len({location.file for location in checkpoint.tensors().values()}) == 4


@pytest.mark.parametrize(
    ("config", "has_head", "tied"),
    [
        ({"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": False}, True, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"text_config": {"tie_word_embeddings": False}}, False, True),
        ({"llm_config": {"tie_word_embeddings": True}}, True, True),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True, True),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_whether_the_head_is_the_embedding(tmp_path: Path, config: dict[str, Any], has_head: bool, tied: bool) -> None:
    make_checkpoint(tmp_path, tied=not has_head)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tied is tied
    assert (checkpoint.output_head() is not None) is has_head


def test_a_model_with_an_image_tower_has_one_text_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    text, image = np.ones((9, 4), np.float32), np.ones((5, 4), np.float32)
    names = {"model.language_model.embed_tokens.weight": text, "model.visual.embed_tokens.weight": image}
    write_weights(tmp_path, names)
    assert open_checkpoint(str(tmp_path)).input_embedding().shape == (9, 4)


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"))
    assert checkpoint.input_embedding().shape == (268, 32)
    assert checkpoint.folder == tmp_path


def test_vocabulary_by_bytes_with_special_and_added_tokens(tmp_path: Path) -> None:
    tokens = ["Ġa", "Ã©", "Ċ", "b"]
    folder = make_checkpoint(tmp_path, vocab_tokens=tokens, special=("<s>",))
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"].append({"id": 5, "content": "Ġplain", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(table))
    vocabulary = load_vocabulary(open_checkpoint(str(folder)))
    assert vocabulary.token_bytes == {b" a": 0, "é".encode(): 1, b"\n": 2, b"b": 3, "Ġplain".encode(): 5}
    assert vocabulary.special == {"<s>": 4}
    assert vocabulary.added == {"<s>": 4, "Ġplain": 5}
    assert vocabulary.name_of(4) == "<s>"
    assert vocabulary.name_of(0) == "' a'"
    assert vocabulary.name_of(77) == "no token"


# --- bad input: what is done to a good checkpoint, and what the one sentence says -------------------


def _rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")


def _index(folder: Path, file: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: file}}))


def _spoil(folder: Path, row: int, value: float) -> None:
    location = open_checkpoint(str(folder)).input_embedding()
    data = bytearray(location.file.read_bytes())
    at = location.offset + row * location.row_nbytes + 4
    data[at : at + 2] = np.array(value, location.numpy_dtype).tobytes()
    location.file.write_bytes(data)


def _weights(folder: Path, **tensors: Any) -> None:
    write_weights(folder, {name.replace("__", "."): value for name, value in tensors.items()})


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "not a whole safetensors file .*ends 10 bytes after the file does"),
    "empty file": (lambda f: _put(f, "model.safetensors", b""), "can't hold the header it announces"),
    "header too long": (
        lambda f: _put(f, "model.safetensors", b"\xff" * 100),
        "can't hold the header it announces",
    ),
    "header not JSON": (
        lambda f: _put(f, "model.safetensors", (4).to_bytes(8, "little") + b"{..}"),
        "its header is not JSON",
    ),
    "header not a table": (
        lambda f: _put(f, "model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        "its header is not a table",
    ),
    "entry without dtype": (
        lambda f: _rewrite_header(f, lambda h: h[EMBEDDING].pop("dtype")),
        "the entry of the tensor 'model.embed_tokens.weight' is not complete",
    ),
    "negative shape": (
        lambda f: _rewrite_header(f, lambda h: h[EMBEDDING].update(shape=[-268, -32])),
        "a size that is not a whole number",
    ),
    "shape and size disagree": (
        lambda f: _rewrite_header(f, lambda h: h[EMBEDDING].update(shape=[269, 32])),
        "should have 17216 bytes and has 17152",
    ),
    "git-lfs pointer": (
        lambda f: _put(f, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer.*git lfs pull",
    ),
    "index names a missing shard": (
        lambda f: _index(f, "model-00001-of-00002.safetensors"),
        "names model-00001-of-00002.safetensors, which is not there",
    ),
    "index leads outside": (lambda f: _index(f, "../x.safetensors"), "a file outside its folder"),
    "index with an absolute path": (lambda f: _index(f, "/etc/passwd"), "a file outside its folder"),
    "index without a map": (
        lambda f: _put(f, "model.safetensors.index.json", b'{"metadata": {}}'),
        "has no weight_map",
    ),
    "index not JSON": (lambda f: _put(f, "model.safetensors.index.json", b"{"), "is not valid JSON"),
    "pickle only": (lambda f: _only(f, "pytorch_model.bin"), "pickled weights only.*save_pretrained"),
    "GGUF only": (lambda f: _only(f, "model-q4.gguf"), "GGUF files only.*original safetensors checkpoint"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no safetensors file"),
    "no embedding": (
        lambda f: _weights(f, layer__weight=np.ones((2, 2), np.float32)),
        "has no input embedding",
    ),
    "integer embedding": (
        lambda f: _weights(f, model__embed_tokens__weight=np.ones((268, 32), np.int8)),
        "is quantized .*type I8.*original checkpoint",
    ),
    "packed embedding": (
        lambda f: _weights(f, model__embed_tokens__qweight=np.ones((268, 4), np.int32)),
        r"is quantized \(model.embed_tokens.qweight\)",
    ),
    "scaled embedding": (
        lambda f: _weights(
            f,
            model__embed_tokens__weight=np.ones((268, 32), np.float32),
            model__embed_tokens__weight_scale=np.ones(1, np.float32),
        ),
        "is quantized",
    ),
    "one-dimensional embedding": (
        lambda f: _weights(f, model__embed_tokens__weight=np.ones(268, np.float32)),
        r"has the shape \[268\] where an input embedding has two dimensions",
    ),
    "two embeddings": (
        lambda f: _weights(f, a__embed_tokens__weight=np.ones((9, 4)), b__embed_tokens__weight=np.ones((9, 4))),
        "several input embeddings",
    ),
    "NaN": (lambda f: _spoil(f, 71, np.nan), "holds NaN: token '[^']+', row 71 of model.embed_tokens.weight"),
    "infinity": (lambda f: _spoil(f, 266, np.inf), r"holds infinity: token <\|im_start\|>, row 266"),
    "all zeros": (
        lambda f: _weights(f, model__embed_tokens__weight=np.zeros((268, 32), np.float32)),
        "is all zeros",
    ),
    "other width": (
        lambda f: _weights(f, model__embed_tokens__weight=np.ones((268, 16), np.float32)),
        "16 wide.*--allow-width-change",
    ),
    "tokenizer without vocabulary": (lambda f: _put(f, "tokenizer.json", b"{}"), "no readable vocabulary"),
    "tokenizer not JSON": (lambda f: _put(f, "tokenizer.json", b"\x00"), "is not valid JSON"),
    "config not JSON": (lambda f: _put(f, "config.json", b"["), "is not valid JSON"),
}


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_one_sentence_and_leave_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    spoil, message = BAD_CHECKPOINTS[what]
    good, bad = make_checkpoint(tmp_path / "good", seed=1), make_checkpoint(tmp_path / "bad")
    spoil(bad)
    out = tmp_path / "w.safetensors"
    if what == "config not JSON":  # read only where it decides something
        with pytest.raises(DttError, match=message):
            open_checkpoint(str(bad)).config()
        return
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(DttError, match=message):
            align(open_checkpoint(str(pair[0])), open_checkpoint(str(pair[1])))
        assert main(["align", str(pair[0]), str(pair[1]), "-o", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dtt align: ")
        assert error.count("\n") == 1
        assert not out.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "no folder or file"),
        ("./nothing", "no folder or file"),
        ("bad id with spaces", "no folder and no public hub model"),
    ],
)
def test_models_that_don_t_exist(model: str, message: str) -> None:
    with pytest.raises(DttError, match=message):
        open_checkpoint(model)


def test_no_hub_is_said(tmp_path: Path) -> None:
    code = "from dtt_plugin.checkpoint.opening import open_checkpoint; open_checkpoint('owner/name')"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **nowhere}, capture_output=True, text=True, check=False
    )
    assert "DttError: There is no folder 'owner/name' and the hub can't be reached" in done.stderr


def test_an_interrupted_download_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    client = sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]

    def unreachable(*_: object, **__: object) -> None:
        raise client.ReadTimeout("the other side is silent")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DttError, match="the hub can't be reached"):
        open_checkpoint("owner/name")


def test_a_hub_model_downloads_only_the_shard_that_holds_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = make_checkpoint(tmp_path / "hub", shards=3)
    local = tmp_path / "snapshots" / "0123abc"
    local.mkdir(parents=True)
    asked: list[str] = []

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        names = {path.name for pattern in allow_patterns for path in hub.glob(pattern)}
        for name in sorted(names):
            if not (local / name).exists():
                (local / name).write_bytes((hub / name).read_bytes())
                asked.append(name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.revision == "0123abc"
    assert checkpoint.input_embedding().shape == (268, 32)
    assert [name for name in asked if name.endswith(".safetensors")] == ["model-00001-of-00003.safetensors"]
    asked.clear()
    (hub / "consolidated.safetensors").write_bytes(b"the same weights again")
    assert len(open_checkpoint("owner/name", need="all").weight_files) == 3
    assert "consolidated.safetensors" not in asked


def test_no_shared_token_and_too_few_anchors_are_errors(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "1", vocab_tokens=["a", "b"], special=(), width=4)
    two = make_checkpoint(tmp_path / "2", vocab_tokens=["c", "d"], special=(), width=4)
    few = make_checkpoint(tmp_path / "3", vocab_tokens=["a", "d"], special=(), width=4)
    opened = [open_checkpoint(str(folder)) for folder in (one, two, few)]
    with pytest.raises(DttError, match="share no token"):
        align(opened[0], opened[1])
    with pytest.raises(DttError, match="1 anchors can't determine a map of 4 dimensions"):
        align(opened[0], opened[2])
    many = open_checkpoint(str(make_checkpoint(tmp_path / "4")))
    with pytest.raises(DttError, match="31 anchors can't determine a map of 32 dimensions"):
        align(many, many, AlignmentOptions(anchors=31))


def test_little_in_common_is_a_warning(tmp_path: Path) -> None:
    tokens = default_vocab_tokens()
    mine = make_checkpoint(tmp_path / "1", vocab_tokens=tokens[:150], width=32)
    other = [f"zz{i}" for i in range(100)]
    theirs = make_checkpoint(tmp_path / "2", vocab_tokens=[*tokens[100:150], *other], width=32)
    report = align(open_checkpoint(str(mine)), open_checkpoint(str(theirs))).report
    assert report.shared_tokens == 53
    assert any("is shared" in warning for warning in report.warnings)


def test_options_that_make_no_sense_are_errors() -> None:
    for options in (
        {"holdout": 0.9},
        {"anchors": 0},
        {"seed": -1},
        {"match": "names"},
        {"weight": "x"},
        {"method": "x"},
    ):
        asked = AlignmentOptions()
        for name, value in options.items():  # of any type, as users give them: the tests' type checks would come first
            object.__setattr__(asked, name, value)
        with pytest.raises(DttError, match=next(iter(options))):
            asked.__post_init__()


def test_the_command_s_defaults_are_the_library_s() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    align_command.add_parser(parser.add_subparsers())
    args = vars(parser.parse_args(["align", "a", "b"]))
    defaults = AlignmentOptions()
    shared = args.keys() & vars(defaults).keys()
    assert len(shared) == 10
    assert {name: args[name] for name in shared} == {name: getattr(defaults, name) for name in shared}


def test_headers_are_read_without_reading_data(tmp_path: Path) -> None:
    """A file of 8 GB that is a hole: only its header may be read."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**33)
    assert read_header(path)[0]["x"].nbytes == 2**33
