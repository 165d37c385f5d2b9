"""A whole table with one command: models x defenses x token files, each cell one lm-eval run.

A cell has a key made of everything that decides about its result. Its folder
below OUT/runs carries the key and appears at once, complete, when the cell is
finished; so an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin import __version__
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.state import argument_states, state
from dtt_plugin.data.records import TOKENS_FILE, data_file
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.prompt.defenses import TOKENS, parse_defense
from dtt_plugin.prompt.formats import check_format
from dtt_plugin.safe_text import printable
from dtt_plugin.sweep.plain_yaml import read_plain_yaml
from dtt_plugin.tokens.files import load_tokens, save_tokens, upstream_models

if TYPE_CHECKING:
    from dtt_plugin.transfer.move import Method

logger = logging.getLogger("dtt_plugin")

PUBLISHED = "published"
"""In place of a token file: the published tokens in the data folder."""
ENGINES = ("dtt_vllm", "dtt_hf")
METHODS = ("procrustes", "copy", "random")
_ARM = ("pretrained", "tokens", "tokens_model", "defense", "prompt_format")
# Model arguments that may name another hub model.
_ADAPTERS = ("peft", "delta", "tokenizer", "lora_local_path")
_DEFAULT_DEFENSES = ("none", "reminder", "sandwich")


@dataclass(frozen=True)
class TokenSource:
    """Where a cell's DefensiveTokens come from: a file as it is, or a file moved from another model."""

    file: Path
    source_model: str | None = None
    method: Method | None = None

    def entry(self, model: str) -> str | None:
        """Return which entry of a published JSON is meant; a token file has only one."""
        return model if model in self._entries else None

    @cached_property
    def _entries(self) -> list[str]:
        return upstream_models(self.file) if self.file.suffix == ".json" else []

    def digest(self, model: str) -> str:
        """Return the SHA-256 of the values that are read from the file, for tokens of `model`."""
        entry = self.entry(self.source_model or model)
        if entry not in self._digests:  # a grid asks once a model
            self._digests[entry] = load_tokens(self.file, model=entry).digest
        return self._digests[entry]

    @cached_property
    def _digests(self) -> dict[str | None, str]:
        return {}


@dataclass(frozen=True)
class Load:
    """What is the same for the cells that share one model in memory."""

    engine: str
    task: str
    settings: Mapping[str, Any]
    """`limit`, `batch_size`, `gen_kwargs` as in the sweep file."""
    model_args: Mapping[str, Any]
    model: str
    prompt_format: str | None
    tokens: TokenSource | None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides about the results, save the defense."""
        tokens = self.tokens
        return {
            "dtt_plugin": __version__,
            "engine": self.engine,
            "task": self.task,
            "settings": dict(self.settings),
            "model_args": dict(self.model_args),
            "model": self.model,
            "weights": self._state(self.model, self.model_args.get("revision")),
            "argument_states": argument_states(self.model_args, self.model),
            "prompt_format": self.prompt_format,
            "tokens": tokens
            and [
                tokens.digest(self.model),
                tokens.source_model,
                tokens.source_model and self._state(tokens.source_model),
                tokens.method,
            ],
        }

    def _state(self, model: str, revision: str | None = None) -> str | None:
        cache_dir = self.model_args.get("cache_dir") or self.model_args.get("download_dir")
        return state(model, revision, cache_dir=cache_dir)


@dataclass(frozen=True)
class Cell:
    """One run of lm-eval."""

    load: Load
    defense: str

    @property
    def name(self) -> str:
        """What a person calls it, in characters for a folder's name."""
        tokens = self.load.tokens
        words = [self.load.model.rstrip("/").rsplit("/", 1)[-1], self.defense]
        words += [tokens.method or tokens.file.name.split(".")[0]] if tokens else []
        return "--".join("".join(c if c.isalnum() or c in "._+-" else "_" for c in word)[:60] for word in words)

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides about the result."""
        return sha256_json([self.load.identity, self.defense])

    def folder(self, out: Path) -> Path:
        """Return the folder that the finished cell has below the sweep's."""
        return out / "runs" / f"{self.name}--{self.key[:16]}"

    def is_finished(self, out: Path) -> bool:
        """Return whether the cell's results are there."""
        return any(self.folder(out).rglob("results_*.json"))


# The sweep file ---------------------------------------------------------------------------------------------------


def read_sweep(path: Path) -> list[Cell]:
    """Read a sweep file (docs/sweep.md) and return its cells, those that share a model in memory side by side.

    Raises:
        DttError: not plain YAML, an unknown or missing key, a value of the wrong type, or a cell that is there twice.
    """
    content = read_plain_yaml(path)
    known = ("engine", "task", "model_args", "gen_kwargs", "limit", "batch_size", "grid")
    top = _mapping(path, "the file", content, known)
    engine = top.get("engine", ENGINES[0])
    if engine not in ENGINES:
        raise DttError(f"{path}: engine: {repr(engine)[:80]} is none of {', '.join(ENGINES)}.")
    model_args = _mapping(path, "model_args", top.get("model_args") or {}, None)
    if ours := model_args.keys() & set(_ARM):
        raise DttError(f"{path}: model_args: {min(ours)} belongs into the grid; see docs/sweep.md.")
    settings = {name: top[name] for name in ("gen_kwargs", "limit", "batch_size") if top.get(name) is not None}
    gen_kwargs = _mapping(path, "gen_kwargs", settings.get("gen_kwargs", {}), None)
    _check_plain(path, "model_args", model_args)
    _check_plain(path, "gen_kwargs", gen_kwargs)
    if not _is_limit(settings.get("limit", 1)):
        raise DttError(f"{path}: limit: {str(settings['limit'])[:80]} is not a positive number of records.")
    batch_size = settings.get("batch_size", 1)
    if not isinstance(batch_size, str) and (type(batch_size) is not int or batch_size < 1):
        raise DttError(f"{path}: batch_size: {repr(batch_size)[:80]} is neither a positive number nor auto.")
    task = _name(path, "task", top.get("task", "alpacafarm_injection"))
    cells: list[Cell] = []
    for number, part in enumerate(_list(path, "grid", top.get("grid")), 1):
        where = f"grid, entry {number}"
        entry = _mapping(path, where, part, ("models", "prompt_format", "defenses", "tokens"))
        cells += list(_cells(path, where, entry, engine=engine, task=task, settings=settings, model_args=model_args))
    if not cells:
        raise DttError(f"{path}: grid: is empty; give at least one entry with models:.")
    seen = set()
    for cell in cells:
        what = (cell.load.model, cell.load.prompt_format, cell.load.tokens, cell.defense)
        if what in seen:
            raise DttError(f"{path}: the grid has {cell.name} twice; remove one of the two.")
        seen.add(what)
    return cells


def _cells(path: Path, where: str, entry: Mapping[str, Any], **common: Any) -> Iterator[Cell]:
    prompt_format = entry.get("prompt_format")
    if prompt_format is not None:
        check_format(_name(path, f"{where}, prompt_format", prompt_format))
    sources = [_token_source(path, where, value) for value in _list(path, f"{where}, tokens", entry.get("tokens", []))]
    by_default = [*_DEFAULT_DEFENSES, *([TOKENS] if sources else [])]
    defenses = _texts(path, f"{where}, defenses", entry.get("defenses", by_default))
    with_tokens = [defense for defense in defenses if TOKENS in parse_defense(defense)]
    if bool(with_tokens) != bool(sources):
        raise DttError(f"{path}: {where}: the defense tokens and the list tokens: need each other; give both or none.")
    for model in _texts(path, f"{where}, models", entry.get("models")):
        for tokens in (None, *sources):
            load = Load(model=model, prompt_format=prompt_format, tokens=tokens, **common)
            yield from (Cell(load, defense) for defense in defenses if (defense in with_tokens) == (tokens is not None))


def _token_source(path: Path, where: str, value: Any) -> TokenSource:
    if isinstance(value, str):
        return TokenSource(_token_file(path, _name(path, f"{where}, tokens", value)))
    outer = _mapping(path, f"{where}, tokens", value, ("transfer",))
    inner = _mapping(path, f"{where}, transfer", outer.get("transfer"), ("source", "tokens", "method"))
    for name in ("source", "tokens"):
        if name not in inner:
            raise DttError(f"{path}: {where}, transfer: {name}: is missing; give source: MODEL and tokens: FILE.")
        _name(path, f"{where}, transfer, {name}", inner[name])
    method = inner.get("method", METHODS[0])
    if method not in METHODS:
        raise DttError(f"{path}: {where}, transfer: method: {repr(method)[:80]} is none of {', '.join(METHODS)}.")
    return TokenSource(_token_file(path, inner["tokens"]), inner["source"], method)


def _token_file(path: Path, name: str) -> Path:
    return data_file(TOKENS_FILE) if name == PUBLISHED else (path.parent / name).resolve()


def _mapping(path: Path, where: str, value: Any, allowed: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DttError(f"{path}: {where} is no mapping of names to values; see docs/sweep.md.")
    if other := [name for name in value if not isinstance(name, str)]:
        raise DttError(f"{path}: {where} has the key {other[0]!r}, which is no name; put it in quotes.")
    unknown = [name for name in value if allowed is not None and name not in allowed]
    if unknown:
        raise DttError(f"{path}: {where} has the unknown key {unknown[0]!r}; it knows {', '.join(allowed or ())}.")
    return value


def _check_plain(path: Path, where: str, value: Any) -> None:
    """Refuse what YAML knows and JSON does not, such as dates: it would reach the model as something else."""
    if isinstance(value, dict):
        for name, inner in _mapping(path, where, value, None).items():
            _check_plain(path, f"{where}, {name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(path, where, inner)
    elif not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        raise DttError(f"{path}: {where}: {str(value)[:80]!r} is neither text nor a number; put it in quotes.")


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DttError(f"{path}: {where}: is no list; see docs/sweep.md.")
    return value


def _texts(path: Path, where: str, value: Any) -> list[str]:
    values = _list(path, where, value)
    if not values:
        raise DttError(f"{path}: {where}: is no list of names; see docs/sweep.md.")
    return [_name(path, where, text) for text in values]


def _name(path: Path, where: str, value: Any) -> str:
    """Return `value` where it can be the name of a model, file or task."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise DttError(f"{path}: {where}: {str(value)[:80]!r} is no name; see docs/sweep.md.")
    return value


def _is_limit(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


# Running it -------------------------------------------------------------------------------------------------------


def download_settings(cells: Sequence[Cell]) -> None:
    """Download the small files of hub models, so that the commits are known that will be loaded.

    A model that can't be had fails when its cells run.
    """
    wanted = set()
    for load in {id(cell.load): cell.load for cell in cells}.values():
        revision = load.model_args.get("revision")
        models = [load.model, *(load.model_args.get(name) for name in _ADAPTERS)]
        wanted |= {(model, revision and str(revision)) for model in models if isinstance(model, str)}
        if load.tokens and load.tokens.source_model:
            wanted.add((load.tokens.source_model, None))
    for model, revision in wanted:
        if not os.path.exists(os.path.expanduser(model)):
            with suppress(DttError):
                open_checkpoint(model, revision=revision, need="tokenizer")


def run_sweep(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """Run the cells that are not finished yet, one process per model in memory, and return those that failed.

    A failure is told and does not stop the cells of other models.

    Raises:
        DttError: another sweep runs in `out`, or it is no place for results.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DttError(f"--out {out} can't be a folder ({error.strerror}); give another.") from error
    failed = []
    try:
        with FileLock(out / ".lock", timeout=0):
            shutil.rmtree(out / "partial", ignore_errors=True)  # what a killed sweep left
            for load, group in groupby(cells, key=lambda cell: cell.load):
                failed += _failed_of(load, list(group), out)
    except Timeout as error:
        raise DttError(f"Another sweep runs in {out}; wait for it, or give another --out.") from error
    return failed


def _failed_of(load: Load, cells: Sequence[Cell], out: Path) -> list[Cell]:
    """Run those cells of one load that are not finished yet, and return those that failed."""
    pending = list(cells)
    try:
        pending = [cell for cell in cells if not cell.is_finished(out)]
        if pending:
            logger.info("%s: %s", load.model, ", ".join(cell.name for cell in pending))
            _run_load(load, pending, out)
        return [cell for cell in pending if not cell.is_finished(out)]
    except Exception as error:  # whatever it is: it concerns this load, and others take hours
        reason = str(error) if isinstance(error, DttError) else f"{type(error).__name__}: {error}"
        names = ", ".join(cell.name for cell in pending)
        print(f"dtt sweep: {names} can't be run: {printable(reason)}", file=sys.stderr, flush=True)
        return pending


def _run_load(load: Load, cells: Sequence[Cell], out: Path) -> None:
    """Evaluate `cells` in a process of its own, which ends with this one: it reads the job from our pipe."""
    if load.identity["weights"] is None:
        raise DttError(f"{load.model} is no folder and no model that the hub gives; check the name, or go online.")
    if replace(load, tokens=load.tokens and replace(load.tokens)).identity != load.identity:
        raise DttError(f"{load.model}, its adapter or its tokens were changed while the sweep ran; start it again.")
    model_args = {**load.model_args, "pretrained": load.model}
    if load.prompt_format:
        model_args["prompt_format"] = load.prompt_format
    if load.tokens:
        model_args |= token_arguments(load, load.tokens, out)
    job = {
        "engine": load.engine,
        "task": load.task,
        "model_args": model_args,
        **load.settings,
        "cells": [{"defense": cell.defense, "key": cell.key, "folder": str(cell.folder(out))} for cell in cells],
    }
    command = [sys.executable, "-m", "dtt_plugin.sweep.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(job, default=str) + "\n")
            worker.stdin.flush()
            worker.wait()
        except BrokenPipeError:
            pass  # it died at once and has said why
        except BaseException:
            worker.kill()
            raise
    if worker.returncode < 0:
        killed = signal.Signals(-worker.returncode).name
        print(f"dtt sweep: {load.model}: its process was ended by {killed}; is there enough memory?", file=sys.stderr)


def token_arguments(load: Load, tokens: TokenSource, out: Path) -> dict[str, str]:
    """Return the model arguments for the tokens, transferred first where the grid asks for it."""
    if tokens.source_model is None or tokens.method is None:
        entry = tokens.entry(load.model)
        return {"tokens": str(tokens.file)} | ({"tokens_model": entry} if entry else {})
    key = sha256_json([__version__, load.model, load.identity["tokens"], load.identity["weights"]])
    target = out / "tokens" / f"{key[:16]}.safetensors"
    try:
        load_tokens(target)
    except DttError:  # not there yet, or damaged
        from dtt_plugin.alignment import AlignmentCache, align, cache_folder
        from dtt_plugin.transfer.move import transfer

        alignment = None
        if tokens.method == "procrustes":
            source = open_checkpoint(tokens.source_model)
            cache = AlignmentCache(cache_folder())
            alignment = align(source, open_checkpoint(load.model), cache=cache, progress=True)
        own = load_tokens(tokens.file, model=tokens.entry(tokens.source_model))
        save_tokens(target, transfer(own, alignment, method=tokens.method, target_model=load.model))
    return {"tokens": str(target)}
