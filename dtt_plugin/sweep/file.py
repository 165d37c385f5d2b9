"""The sweep file: models x defenses x token files, each cell one lm-eval run.

A cell has a key made of everything that decides about its result. Its folder
below OUT/runs carries the key and appears at once, complete, when the cell is
finished; so an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dtt_plugin import __version__
from dtt_plugin.checkpoint.state import argument_states, state
from dtt_plugin.data.records import PUBLISHED, TOKENS_FILE, data_file
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.prompt.defenses import TOKENS, parse_defense
from dtt_plugin.prompt.formats import check_format
from dtt_plugin.sweep.plain_yaml import read_plain_yaml
from dtt_plugin.sweep.resources import check_resources
from dtt_plugin.tokens.files import load_tokens, upstream_models

ENGINES = ("dtt_vllm", "dtt_hf")
METHODS = ("procrustes", "copy", "random")
_ARM = ("pretrained", "tokens", "tokens_model", "defense", "prompt_format")
# Model arguments that may name another hub model.
ADAPTERS = ("peft", "delta", "tokenizer", "lora_local_path")
_DEFAULT_DEFENSES = ("none", "reminder", "sandwich")


@dataclass(frozen=True)
class TokenSource:
    """Where a cell's DefensiveTokens come from: a file as it is, or a file moved from another model."""

    file: Path
    source_model: str | None = None
    method: str | None = None

    def entry(self, model: str) -> str | None:
        """Return which entry of a published JSON is meant; a token file has only one."""
        return model if model in self._entries else None

    @cached_property
    def _entries(self) -> list[str]:
        return upstream_models(self.file) if self.file.suffix == ".json" else []

    def digest(self, model: str) -> str:
        """Return the SHA-256 of the values that are read from the file, for tokens of `model`."""
        return self._facts(model)[0]

    def k(self, model: str) -> int:
        """Return the number of tokens that are read from the file, for tokens of `model`."""
        return self._facts(model)[1]

    def _facts(self, model: str) -> tuple[str, int]:
        entry = self.entry(self.source_model or model)
        if entry not in self._read:  # a grid asks once a model
            tokens = load_tokens(self.file, model=entry)
            self._read[entry] = tokens.digest, tokens.k
        return self._read[entry]

    @cached_property
    def _read(self) -> dict[str | None, tuple[str, int]]:
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
    known = ("engine", "task", "model_args", "gen_kwargs", "limit", "batch_size", "resources", "grid")
    top = _mapping(path, "the file", content, known)
    check_resources(path, top.get("resources"))
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
