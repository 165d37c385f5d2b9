"""Where the benchmark data is, and whether it is the right one.

The AlpacaFarm records and the ignore-attack sentences are CC BY-NC 4.0: they
are never shipped with this package, only their digests are.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dtt_plugin.errors import DttError, MissingDataError
from dtt_plugin.files import reading
from dtt_plugin.files.cache import DOWNLOADS
from dtt_plugin.files.digests import sha256_bytes

RECORDS_FILE = "davinci_003_outputs.json"
SENTENCES_FILE = "attack_sentences.json"
TOKENS_FILE = "defensivetokens.json"
PUBLISHED = "published"
"""In place of a token file: the published tokens in the data folder."""
DATA_DIR_VARIABLE = "DTT_DATA_DIR"
PLACEHOLDER = "{injected_prompt}"
"""In an ignore-attack sentence: where the injected prompt goes."""

_LARGEST_DATA = 256 << 20
ASSETS = Path(__file__).parents[1] / "assets"


class Record(TypedDict):
    """One benchmark record: trusted instruction, untrusted data, a plausible first answer."""

    instruction: str
    input: str
    output: str


class OwnRecord(Record):
    """A record with an injected prompt of its own, and the rule that says when it was followed."""

    injection: str
    success: dict[str, Any]


class IgnoreSentences(NamedTuple):
    """The ignore-attack sentences, each with `PLACEHOLDER`."""

    train: list[str]
    test: list[str]


def data_folder() -> Path:
    """Return `$DTT_DATA_DIR`, or the user's cache that `dtt fetch` fills."""
    if chosen := os.environ.get(DATA_DIR_VARIABLE):
        return Path(chosen).expanduser()
    return DOWNLOADS.folder


def data_file(name: str, *, fetch: str = "dtt fetch") -> Path:
    """Return the path of a data file.

    Args:
        name: below the data folder.
        fetch: the command that downloads it.

    Raises:
        DttError: it is not there; nothing else is ever used in its place.
    """
    path = data_folder() / name
    if not path.is_file():
        raise MissingDataError(
            f"{path} does not exist; run `{fetch}` to download it, or set {DATA_DIR_VARIABLE} to the folder"
            f" that holds {name}."
        )
    return path


def read_json(path: Path) -> Any:
    """Return the JSON value in the file at `path`.

    Raises:
        DttError: the file can't be read or is not JSON.
    """
    try:
        return reading.read_json(path, most=_LARGEST_DATA)
    except (OSError, ValueError) as error:
        raise DttError(f"{path} is not readable JSON ({error}); restore the file or fetch it again.") from error


def load_records(path: Path, *, allow_modified: bool = False) -> list[Record]:
    """Return the AlpacaFarm evaluation records that have an input, in file order.

    Args:
        path: `davinci_003_outputs.json`, 805 records of which 208 have an input.
        allow_modified: accept other records than the 208 known ones.

    Raises:
        DttError: the file is malformed, or its records are not the known ones; names the first that differs.
    """
    value = read_json(path)
    if not isinstance(value, list):
        raise DttError(f"{path} is not a list of records; fetch it again with `dtt fetch`.")
    records: list[Record] = []
    for number, item in enumerate(value):
        fields = [item.get(field) if isinstance(item, dict) else None for field in Record.__annotations__]
        if not all(isinstance(field, str) for field in fields):
            raise DttError(f"{path}: record {number} lacks a text in one of instruction, input, output.")
        if fields[1]:
            records.append(Record(instruction=fields[0], input=fields[1], output=fields[2]))  # type: ignore[typeddict-item]
    if not records:
        raise DttError(f"{path} has no record with an input.")
    if not allow_modified:
        found = [_digest([r["instruction"], r["input"], r["output"]]) for r in records]
        _compare(path, "record with an input", found, _known_digests()["records"])
    return records


def load_sentences(path: Path, *, allow_modified: bool = False) -> IgnoreSentences:
    """Return the ignore-attack sentences in `path` (`{"train": [...], "test": [...]}`).

    Raises:
        DttError: the file is malformed, or its sentences are not the known ones; names the first that differs.
    """
    value = read_json(path)
    lists = [value.get(part) if isinstance(value, dict) else None for part in IgnoreSentences._fields]
    for part, sentences in zip(IgnoreSentences._fields, lists, strict=True):
        if not isinstance(sentences, list) or not sentences:
            raise DttError(f"{path} has no list of sentences called {part!r}; fetch it again with `dtt fetch`.")
        for number, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or PLACEHOLDER not in sentence:
                raise DttError(f"{path}: {part} sentence {number} lacks the placeholder {PLACEHOLDER}.")
        if not allow_modified:
            known = _known_digests()["sentences"][part]
            _compare(path, f"{part} sentence", [_digest(sentence) for sentence in sentences], known)
    return IgnoreSentences(*lists)  # type: ignore[arg-type]


def _digest(value: Any) -> str:
    return sha256_bytes(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))[:16]


@cache
def _known_digests() -> dict[str, Any]:
    digests: dict[str, Any] = json.loads((ASSETS / "alpacafarm_digests.json").read_text(encoding="utf-8"))
    return digests


def _compare(path: Path, what: str, found: list[str], known: list[str]) -> None:
    if found == known:
        return
    first = next(
        (i for i, pair in enumerate(zip(found, known, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(known)),
    )
    raise DttError(
        f"{path} is not the protocol's data: {what} {first} differs first ({len(found)} found, {len(known)} expected);"
        " fetch the file again with `dtt fetch`, or accept it with --metadata '{\"allow_modified_data\": true}'."
    )
