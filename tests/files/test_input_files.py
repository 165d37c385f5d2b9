"""What costs more than a file is worth, or waits for ever, is refused at once; odd but whole files are read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin import cli
from dtt_plugin.checkpoint.tensors import read_header, write_safetensors
from dtt_plugin.data.records import load_records, load_sentences, read_json
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import parse_json
from dtt_plugin.tokens.files import load_tokens, save_adapter, save_tokens
from tests.bake_helpers import random_tokens, tiny
from tests.conftest import ROOT

SECONDS, MEMORY_MB = 10.0, 2000
TOKENS = {"format": "dtt.tokens/1", "model": "m", "method": "native"}


def header(path: Path, text: bytes, *, data: int = 0) -> None:
    """Write a safetensors file with the header `text` and `data` zeros, which take no space on the disk."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + data)


def sparse_tokens(path: Path, name: str, k: int, width: int, dtype: str = "F32") -> None:
    nbytes = k * width * {"F32": 4, "F64": 8}[dtype]
    entry = {"dtype": dtype, "shape": [k, width], "data_offsets": [0, nbytes]}
    header(path, json.dumps({"__metadata__": TOKENS, name: entry}).encode(), data=nbytes)


def adapter(path: Path) -> None:
    sparse_tokens(path / "adapter_model.safetensors", "prompt_embeddings", 1000, 500_000, "F64")
    (path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 6 << 30)


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
BOMBS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lists.safetensors": (lambda p: header(p, b"{" + b"[]," * (12 << 20)), "announces a header of 36 MB"),
    "more_lists.safetensors": (lambda p: header(p, b'{"a":[' + b"[]," * (10 << 20) + b"0]}"), "lists and tables"),
    "empty.safetensors": (
        lambda p: header(p, b"{" + b",".join(b'"%d":%s' % (i, EMPTY) for i in range(260_000)) + b"}"),
        "lists 260000 tensors",
    ),
    "huge_numbers.safetensors": (
        lambda p: header(p, b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b',1],"data_offsets":[0,0]}}'),
        "not a whole number",
    ),
    "many_dimensions.safetensors": (
        lambda p: header(p, b'{"a":{"dtype":"F32","shape":[' + b"1," * 99999 + b'0],"data_offsets":[0,0]}}'),
        "100000 dimensions",
    ),
    "many_tokens.safetensors": (lambda p: sparse_tokens(p, "defensive_tokens", 1000, 1_000_000), "at most 16777216"),
    "wide_tokens.safetensors": (lambda p: sparse_tokens(p, "defensive_tokens", 1, 1 << 30), "at most 16777216"),
    "adapter": (adapter, "at most 16777216"),
    "lists.json": (lambda p: p.write_bytes(b"[" + b"[]," * (22 << 20) + b"0]"), "more than 64 MB"),
    "fewer_lists.json": (lambda p: p.write_bytes(b"[" + b"[]," * (20 << 20) + b"0]"), "neither a token file"),
    "sparse.json": (sparse, "more than 64 MB"),
    "sparse.safetensors": (sparse, "more than 64 MB"),
    "numbers.json": (lambda p: p.write_bytes(b'{"m":[[' + b"1," * (17 << 20) + b"1]]}"), "at most 16777216"),
    "models.json": (
        lambda p: p.write_bytes(b"{" + b",".join(b'"%d":[[1]]' % i for i in range(200_000)) + b"}"),
        "more than 1000",
    ),
    "twice.json": (
        lambda p: p.write_bytes(b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b',"7":0}'),
        "'7' stands there twice",
    ),
}


def test_small_files_with_large_costs_are_refused_in_time_and_memory(tmp_path: Path) -> None:
    for name, (write, _) in BOMBS.items():
        write(tmp_path / name)
    # In one process, so that the imports are paid once; each may take what a file of its own could.
    script = (
        "import sys, time, contextlib, io\n"
        "from dtt_plugin import cli\n"
        "from dtt_plugin.costs import peak_memory_mb\n"
        "for path in sys.argv[1:]:\n"
        "    started, said = time.process_time(), io.StringIO()\n"
        "    with contextlib.redirect_stderr(said): code = cli.main(['inspect', path])\n"
        "    seconds = time.process_time() - started\n"
        "    print(code, seconds, peak_memory_mb(), said.getvalue().replace('\\n', '|'), sep='\\t')\n"
    )
    paths = [str(tmp_path / name) for name in BOMBS]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS), done.stderr
    for (name, (_, words)), line in zip(BOMBS.items(), lines, strict=True):
        code, seconds, memory, sentence = line.split("\t")
        assert (code, sentence.count("|")) == ("2", 1), (name, sentence)
        assert words in sentence, (name, sentence)
        assert float(seconds) < SECONDS, name
        assert float(memory) < MEMORY_MB, name


def test_the_largest_real_files_pass(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 999}.mlp.experts.{i % 999}.down_proj.weight_scale_inv" for i in range(100_000)]
    entries = {
        name: {"dtype": "F32", "shape": [56, 16], "data_offsets": [i * 3584, i * 3584 + 3584]}
        for i, name in enumerate(names)
    }
    header(tmp_path / "model.safetensors", json.dumps(entries).encode(), data=3584 * len(names))
    assert len(read_header(tmp_path / "model.safetensors")[0]) == 100_000
    merges = b",".join(b'["%d","%d"]' % (i, i) for i in range(600_000))
    assert len(parse_json(b'{"model":{"merges":[' + merges + b"]}}")["model"]["merges"]) == 600_000
    sparse_tokens(tmp_path / "t.safetensors", "defensive_tokens", 1000, 16_384)
    assert load_tokens(tmp_path / "t.safetensors").k == 1000


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a pipe where a file is needed"),
    "device": (device, "is a device where a file is needed"),
    "socket": (bound_socket, "is a socket where a file is needed"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_at_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = KINDS[kind]
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    save_tokens("t.safetensors", random_tokens(32))
    save_adapter("adapter", random_tokens(32))
    tiny(Path("base"), shards=2)
    odd = Path("odd.safetensors")
    make(odd)
    more_templates = tiny(Path("more"), extra_rows=8) / "additional_chat_templates"
    more_templates.mkdir()
    make(more_templates / "tool_use.jinja")
    for name in ("adapter/adapter_config.json", "base/config.json"):
        Path(name).unlink()
        make(Path(name))
    commands: list[list[Any]] = [
        ["inspect", odd], ["convert", odd, "o.json"],
        ["transfer", odd, "--method", "copy", "--target-model", "a/b", "-o", "o"],
        ["transfer", "t.safetensors", odd, "-o", "o"], ["bake", "base", "--tokens", odd, "--out", "o"],
        ["push", odd, "a/b"], ["convert", "adapter", "o"],
        ["inspect", "base"], ["bake", "base", "--tokens", "t.safetensors", "--out", "o"],
        ["bake", "more", "--tokens", "t.safetensors", "--out", "o"],
        ["align", "more", "more", "--anchors-file", odd, "--out", "o"],
    ]  # fmt: skip
    for command in commands:
        assert cli.main([*map(str, command)]) == 2, command
        sentence = capsys.readouterr().err
        assert sentence.count("\n") == 1, command
        # What a model's or adapter's folder links to from outside is refused before anybody looks what it is.
        told = (words, "is a link to a file outside") if kind == "device" else (words,)
        assert any(w in sentence for w in told) or (command[0] == "bake" and "base" in sentence), (command, sentence)
    for read in (read_json, load_records, load_sentences):
        with pytest.raises(DttError, match=words):
            read(odd)


def test_a_folder_in_a_files_place_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokens(tmp_path / "t.safetensors", random_tokens(32))
    (tmp_path / "w").mkdir()
    assert cli.main(["transfer", str(tmp_path / "t.safetensors"), str(tmp_path / "w"), "-o", "o"]) == 2
    assert "is a folder where a file is needed" in capsys.readouterr().err
    with pytest.raises(DttError, match="is a folder"):
        read_json(tmp_path / "w")


def test_null_metadata_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny(tmp_path / "base")
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    text = json.dumps({"__metadata__": None, **{k: v for k, v in table.items() if k != "__metadata__"}}).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert read_header(weights)[1] == {}
    assert cli.main(["inspect", str(base)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    odd: tuple[Any, ...] = ([], "x", 1, {"a": {}}, {"a": []})
    for metadata in odd:
        text = json.dumps({"__metadata__": metadata}).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(DttError, match="its metadata"):
            read_header(weights)


RECORDS = [{"instruction": "a", "input": "b", "output": "c"}]
PUBLISHED = {"a/b": [[1.0, 2.0]]}


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RECORDS), encoding="utf-8-sig")
    assert load_records(tmp_path / "r.json", allow_modified=True) == RECORDS
    (tmp_path / "p.json").write_text(json.dumps(PUBLISHED), encoding="utf-8-sig")
    assert load_tokens(tmp_path / "p.json").model == "a/b"
    base = tiny(tmp_path / "base")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text((base / name).read_text(), encoding="utf-8-sig")
    assert cli.main(["inspect", str(base)]) == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_another_encoding_is_a_sentence(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(json.dumps([{"instruction": "é"}], ensure_ascii=False).encode(encoding))
    with pytest.raises(DttError, match="not readable JSON"):
        load_records(tmp_path / "r.json")
    with pytest.raises(DttError, match="neither a token file"):
        load_tokens(tmp_path / "r.json")


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"a/😀": [[1.0]]}))
    assert load_tokens(tmp_path / "p.json").model == "a/😀"
    (tmp_path / "p.json").write_text(r'{"a/\ud83d": [[1.0]]}')
    with pytest.raises(DttError, match="neither a token file"):
        load_tokens(tmp_path / "p.json")
    write_safetensors(tmp_path / "t.safetensors", {"x": np.ones((1, 1), np.float32)}, {"a": "b"})
    content = (tmp_path / "t.safetensors").read_bytes().replace(b'"b"', b'"\\ud800"')
    length = int.from_bytes(content[:8], "little") + 5
    (tmp_path / "t.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(DttError, match="half a surrogate pair"):
        read_header(tmp_path / "t.safetensors")


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
    header(tmp_path / "x.safetensors", json.dumps({f"t{i}": entry for i in range(9)}).encode(), data=256)
    with pytest.raises(DttError, match="overlap"):
        read_header(tmp_path / "x.safetensors")


def test_an_alignment_of_impossible_width_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokens(tmp_path / "t.safetensors", random_tokens(32))
    width = 60_000  # 29 GB that take no space on the disk
    entry = {"dtype": "F64", "shape": [width, width], "data_offsets": [0, width * width * 8]}
    metadata = {"format": "dtt.alignment/1", "report": "{}"}
    text = json.dumps({"__metadata__": metadata, "W": entry}).encode()
    header(tmp_path / "w.safetensors", text, data=width * width * 8)
    command = ["transfer", tmp_path / "t.safetensors", tmp_path / "w.safetensors", "-o", tmp_path / "o"]
    assert cli.main([*map(str, command)]) == 2
    assert "wider than any model" in capsys.readouterr().err
