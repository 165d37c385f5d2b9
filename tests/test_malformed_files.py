"""No file that someone else made ends a reader in a traceback or for ever: 1,000 spoilt ones."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest

from dtt_plugin import cli
from dtt_plugin.alignment import align, save_alignment
from dtt_plugin.bake import bake
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.data.fetch import literal_sentences
from dtt_plugin.data.records import load_records, load_sentences
from dtt_plugin.data.suffixes import AttackFile, Suffix, write_attacks
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import save_adapter, save_tokens, save_upstream_json
from dtt_plugin.training.records import load_training_data
from tests.bake_helpers import random_tokens, tiny
from tests.checkpoints import CHAT_TEMPLATE
from tests.conftest import ROOT
from tests.lm_eval_output import planted, write_run
from tests.mutations import spoilt

FILES = 1000
STAMP = "2026-01-01T00-00-00.000000"
SECONDS_EACH = 10.0


class Reader(NamedTuple):
    """One way to read files: a command of `dtt`, or a function of a path."""

    files: tuple[str, ...]
    """Which are spoilt, one at a time, relative to the folder."""
    arguments: tuple[str, ...] = ()
    """Of the command; those that start with "./" are paths in the folder."""
    function: Callable[[Path], Any] | None = None
    weight: int = 1
    """How many of the spoilt files it gets, relative to the others."""


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SETTINGS = ("config.json", "generation_config.json", "chat_template.jinja")
_INDEX = "model.safetensors.index.json"
_BASE = tuple(f"base/{name}" for name in (*_TOKENIZER, *_SETTINGS, _INDEX, "model-00001-of-00002.safetensors"))
_BAKED = tuple(
    f"baked/{name}" for name in ("dtt_checkpoint.json", "dtt_checkpoint.json", _INDEX, "tokenizer_config.json")
)

_RUN = tuple(
    f"run/owner__model/{name}" for name in (f"results_{STAMP}.json", f"samples_alpacafarm_injection_{STAMP}.jsonl")
)
_UTILITY = tuple(f"utility/{name}" for name in (f"results_{STAMP}.json", f"samples_utility_gsm8k_{STAMP}.jsonl"))
_TOKENS, _MAP, _OUT = "./t.safetensors", "./w.safetensors", "./out.safetensors"

READERS = (
    Reader(("t.safetensors",), ("inspect", _TOKENS)),
    Reader(("t.safetensors",), ("convert", _TOKENS, "./out.json")),
    Reader(("t.safetensors",), ("convert", _TOKENS, _OUT)),
    Reader(("t.safetensors", "w.safetensors"), ("transfer", _TOKENS, _MAP, "--compare", "--out", _OUT)),
    Reader(("p.json",), ("inspect", "./p.json")),
    Reader(("p.json",), ("convert", "./p.json", "./out", "--tokens-model", "a/b")),
    Reader(("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), ("inspect", "./adapter")),
    Reader(("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), ("convert", "./adapter", _OUT)),
    Reader(("w.safetensors",), ("inspect", _MAP)),
    Reader((*_BASE[-2:], "base/config.json"), ("inspect", "./base"), weight=2),
    Reader(_BASE[:2] + _BASE[-2:], ("align", "./base", "./other", "--no-cache", "--out", _OUT)),
    *(
        Reader((name,), ("align", "./base", "./other", "--no-cache", "--out", _OUT, "--anchors-file", f"./{name}"))
        for name in ("anchors.json", "anchors.txt")
    ),
    Reader(_BASE, ("bake", "./base", "--tokens", _TOKENS, "--out", "./out"), weight=3),
    Reader(_BAKED, ("inspect", "./baked"), weight=3),
    Reader(("sweep.yaml",), ("sweep", "./sweep.yaml", "--dry-run"), weight=2),
    Reader(("records.json",), function=lambda path: load_records(path, allow_modified=True)),
    Reader(("records.json",), function=lambda path: load_training_data(str(path))),
    Reader(("sentences.json",), function=lambda path: load_sentences(path, allow_modified=True)),
    Reader(("config.py",), function=literal_sentences),
    Reader(_RUN, ("leaderboard", "./run", "--json"), weight=2),
    Reader(_RUN, ("rescore", f"./{_RUN[0]}")),
    Reader(("t.safetensors", "p.json"), ("leaderboard", "./run", "--json", "--tokens", _TOKENS, "./p.json")),
    Reader(("log.jsonl",), ("leaderboard", "./run", "--json", "--log", "./log.jsonl")),
    Reader(("soft.attacks.jsonl",), ("leaderboard", "./soft.attacks.jsonl", "--format", "markdown")),
    Reader(_UTILITY, ("leaderboard", "./utility", "--format", "markdown")),
)
_SENTENCES = {"train": ["Do {injected_prompt}"], "test": ["Now {injected_prompt}", "{injected_prompt}!"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole file or folder of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    base = tiny(folder / "base", shards=2, extra_rows=8)
    tiny(folder / "other", extra_rows=8)
    (base / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "x"}})
    )
    (base / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 267, "<|im_start|>": 266}))
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [267], "top_k": 20, "suppress_tokens": [1]})
    )
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "anchors.json").write_text(json.dumps([chr(i) for i in range(33, 120)]))
    (folder / "anchors.txt").write_text("\n".join(chr(i) for i in range(33, 120)))
    tokens = replace(random_tokens(32), model="a/b", metadata={"align_seconds": "1.5", "note": "x"})
    save_tokens(folder / "t.safetensors", tokens)
    save_adapter(folder / "adapter", tokens)
    save_upstream_json(folder / "p.json", {"a/b": tokens.rows[:2, :8], "c/d": np.ones((2, 8), np.float32)})
    save_alignment(folder / "w.safetensors", align(open_checkpoint(str(base)), open_checkpoint(str(folder / "other"))))
    bake(str(base), tokens, folder / "baked")
    shutil.copy(ROOT / "examples" / "prompt_defenses.yaml", folder / "sweep.yaml")
    records = [{"instruction": "a", "input": "b" if i else "", "output": "c"} for i in range(4)]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "sentences.json").write_text(json.dumps(_SENTENCES))
    (folder / "config.py").write_text(f"X = 1\nIGNORE_ATTACK_SENTENCES = {_SENTENCES!r}\n")
    write_run(folder / "run", outcomes={"ignore": planted(2, 4), "completion": planted(1, 4)}, refusal=planted(1, 4))
    log = [{"format": "dtt.training/1", "label": "x"}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "asr": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    _write_attacks(folder / "soft.attacks.jsonl")
    _write_utility(folder / "utility")
    return folder


def _write_attacks(path: Path) -> None:
    suffixes = tuple(Suffix(i, f"{i:016d}", None, 0.5, 10 * i, i > 0, [[0, 1.5]], 10**9, "hacked") for i in range(3))
    arm = {"model": "a/b", "weights": "0", "defense": "tokens", "tokens_sha256": "1" * 64, "prompt_format": "model"}
    budget = {"name": "lite", "steps": 50, "suffix_tokens": 10, "seed": 0}
    header = ("soft", "injection_demo", "0" * 64, "Print", "naive", arm, 48, budget)
    write_attacks(path, AttackFile(*header, flops=10**9, suffixes=suffixes))


def _write_utility(folder: Path) -> None:
    folder.mkdir()
    samples = [
        {"doc_id": i, "filter": name, "exact_match": i % 2, "arguments": {"gen_args_0": {"arg_0": "Q"}}}
        for name in ("strict-match", "flexible-extract")
        for i in range(4)
    ]
    (folder / f"samples_utility_gsm8k_{STAMP}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    results = {
        "results": {"utility_gsm8k": {"exact_match,flexible-extract": 0.5}},
        "configs": {"utility_gsm8k": {"generation_kwargs": {"until": ["Q:"]}}},
        "config": {"model": "hf", "model_args": {"pretrained": "a/b"}, "limit": 4},
        "n-samples": {"utility_gsm8k": {"original": 8, "effective": 4}},
    }
    (folder / f"results_{STAMP}.json").write_text(json.dumps(results))


class _TooLongError(BaseException):
    """Not an Exception, so that nothing that is tested catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(reader: Reader, folder: Path, file: str) -> str:
    """Read and return what came of it: "accepted", "refused", or a fault in words."""
    said = io.StringIO()
    try:
        with time_limit(SECONDS_EACH), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if reader.function is not None:
                reader.function(folder / file)
                return "accepted"
            arguments = [str(folder / a[2:]) if a.startswith("./") else a for a in reader.arguments]
            code = cli.main(arguments)
    except DttError:
        return "refused"
    except _TooLongError:
        return "too long"
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {str(error)[:100]!r} at {Path(last.filename).name}:{last.lineno}"
    if code == 2:
        return "refused" if "dtt " in said.getvalue() else "refused without a sentence"
    return "accepted"


def faults(readers: tuple[Reader, ...], folder: Path, count: int, seed: int = 0) -> tuple[Counter[str], dict[str, str]]:
    """Spoil `count` files one after the other, each restored afterwards.

    Returns:
        How often each outcome came, and for each fault which reader, file and number of the generator show it.
    """
    outcomes: Counter[str] = Counter()
    found: dict[str, str] = {}
    order = [reader for reader in readers for _ in range(reader.weight)]
    for number in range(count):
        random = Random(f"{seed} {number}")
        reader = order[number % len(order)]
        file = random.choice(reader.files)
        whole = (folder / file).read_bytes()
        (folder / file).unlink()  # a hard link may be another model's file
        (folder / file).write_bytes(spoilt(whole, random))
        try:
            outcome = read(reader, folder, file)
        finally:
            (folder / file).write_bytes(whole)
            for out in folder.glob("out*"):
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        outcomes[outcome] += 1
        if outcome not in ("accepted", "refused"):
            found.setdefault(outcome, f"{' '.join(reader.arguments[:1])} {file}, number {number}")
    return outcomes, found


def test_the_whole_files_are_read(folder: Path) -> None:
    for reader in READERS:
        assert read(reader, folder, reader.files[0]) == "accepted", reader
        for out in folder.glob("out*"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()


def test_a_thousand_spoilt_files_end_no_reader_in_a_traceback(folder: Path) -> None:
    outcomes, found = faults(READERS, folder, FILES)
    assert not found, "\n".join(f"{outcome}  <-  {where}" for outcome, where in found.items())
    assert outcomes["refused"] > FILES // 3, "most of the mutations must matter"
    assert outcomes["accepted"] > FILES // 20, "and some must get past the first check"


_ALIGN = Reader(("base/tokenizer.json",), ("align", "./base", "./other", "--no-cache", "--out", _OUT))
_BAKE = Reader(("base/tokenizer.json",), ("bake", "./base", "--tokens", _TOKENS, "--out", "./out"))
_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": ["<|im_start|>", 0]}, {"Sequence": ["A", 0]}],  # which `tokenizers` reads, too
    "pair": [{"Sequence": ["A", 0]}, {"Sequence": ["B", 1]}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [266], "tokens": ["<|im_start|>"]}},
}
_SPOILT_TOKENIZERS: dict[str, tuple[Reader, str, dict[str, Any]]] = {
    "a length that is text": (_BAKE, "tokenizer_config.json", {"model_max_length": "2048"}),
    "a length that is a table": (_BAKE, "tokenizer_config.json", {"model_max_length": {}}),
    "a token of 3000 letters": (_BAKE, "tokenizer_config.json", {"pad_token": "x" * 3000}),
    "an id of 70 bits": (_ALIGN, "tokenizer.json", {"added_tokens": [{"content": "x", "id": 1 << 70}]}),
    "an id of 40 bits": (_ALIGN, "tokenizer.json", {"added_tokens": [{"content": "x", "id": 1 << 40}]}),
    "no id": (_ALIGN, "tokenizer.json", {"added_tokens": [{"content": "x", "id": None}]}),
    "a token that is a number": (_ALIGN, "tokenizer.json", {"added_tokens": [{"content": 1, "id": 266}]}),
    "a row of 70 bits": (_ALIGN, "tokenizer.json", {"model": {"vocab": {"a": 1 << 70}}}),
    "pieces in the short spelling": (_BAKE, "tokenizer.json", {"post_processor": _TEMPLATE}),
    "the same in a sequence": (
        _BAKE,
        "tokenizer.json",
        {"post_processor": {"type": "Sequence", "processors": [_TEMPLATE]}},
    ),
    "a template without the text": (
        _BAKE,
        "tokenizer.json",
        {"post_processor": {**_TEMPLATE, "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]}},
    ),
    "an empty template": (_BAKE, "tokenizer.json", {"post_processor": {**_TEMPLATE, "single": []}}),
}


@pytest.mark.parametrize("case", _SPOILT_TOKENIZERS)
def test_a_tokenizer_with_a_value_of_another_kind_is_refused(folder: Path, case: str) -> None:
    reader, name, change = _SPOILT_TOKENIZERS[case]
    path = folder / "base" / name
    whole = path.read_bytes()
    path.write_text(json.dumps(json.loads(whole) | change))
    try:
        assert read(reader, folder, name) == "refused"
    finally:
        path.write_bytes(whole)


def test_the_search_finds_a_reader_that_fails_or_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_malformed_files.SECONDS_EACH", 0.2)

    def careless(path: Path) -> None:
        if path.read_bytes().count(b'"'):
            json.loads(path.read_bytes().decode(errors="replace"))["train"][0].lower()

    def slow(path: Path) -> None:
        content = path.read_bytes()  # not in the loop: the alarm would leave the file open
        while not content.startswith(b'{"train": ["D'):
            pass

    file = ("sentences.json",)
    assert {name.partition(":")[0] for name in faults((Reader(file, function=careless),), folder, 60)[1]} >= {
        "KeyError",
        "TypeError",
        "JSONDecodeError",
    }
    assert "too long" in faults((Reader(file, function=slow),), folder, 10)[1]
