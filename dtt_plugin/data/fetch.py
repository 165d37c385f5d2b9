"""Download the benchmark data from its own homes and check every byte that is used.

Nothing downloaded is executed: the attack sentences are read out of a Python
source file as a literal.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from dtt_plugin.data.records import (
    DATA_DIR_VARIABLE,
    RECORDS_FILE,
    SENTENCES_FILE,
    TOKENS_FILE,
    load_records,
    load_sentences,
)
from dtt_plugin.data.sources import BENCHMARKS, Source
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.files.replacing import replacing
from dtt_plugin.progress import Bar

if TYPE_CHECKING:
    import requests

_SENTENCES_NAME = "IGNORE_ATTACK_SENTENCES"
_TIMEOUT = 60  # seconds without a byte
_MOST_BYTES = 256 << 20


def _install_records(downloaded: Path, target: Path) -> None:
    load_records(downloaded)
    _copy(downloaded, target)


def _install_sentences(downloaded: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_text(literal_sentences(downloaded), encoding="utf-8")
        load_sentences(temporary)


def literal_sentences(downloaded: Path) -> str:
    """Return the sentences in Meta SecAlign's config.py as JSON, without running it.

    Raises:
        DttError: they don't stand there as a literal.
    """
    try:
        tree = ast.parse(read_bytes(downloaded).decode())
        literal = next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and any(isinstance(name, ast.Name) and name.id == _SENTENCES_NAME for name in node.targets)
        )
        sentences = ast.literal_eval(literal)
        return json.dumps(sentences, indent=2)
    # Python's parser ends in one of the last three on nested or unhashable literals.
    except (SyntaxError, ValueError, StopIteration, TypeError, RecursionError, MemoryError) as error:
        raise DttError(f"The download of {SENTENCES_FILE} has no literal {_SENTENCES_NAME} any more.") from error


def _copy(downloaded: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(downloaded.read_bytes())


SOURCES = (
    Source(
        RECORDS_FILE,
        "https://huggingface.co/datasets/hamishivi/alpaca-farm-davinci-003-2048-token/resolve/main/davinci_003_outputs.json",
        "CC BY-NC 4.0",
        _install_records,
        size=704_788,
    ),
    Source(
        SENTENCES_FILE,
        "https://raw.githubusercontent.com/facebookresearch/Meta_SecAlign/main/config.py",
        "CC BY-NC 4.0",
        _install_sentences,
        size=20_000,
    ),
    Source(
        TOKENS_FILE,
        "https://raw.githubusercontent.com/Sizhe-Chen/DefensiveToken/main/defensivetokens.json",
        "CC BY-NC 4.0",
        size=1_745_430,
        sha256="e82e56dd1b98822b99f3a3ba5b010eeadf5f92d0ca6885009d8e80306c2e6081",
    ),
)
"""What `dtt fetch` downloads when nothing else is asked for."""
SETS = tuple(dict.fromkeys(source.set for source in (*SOURCES, *BENCHMARKS)))


def chosen_sources(only: Sequence[str]) -> list[Source]:
    """Return the sources of the named sets; `all` names every one.

    Raises:
        DttError: there is no such set.
    """
    if unknown := [name for name in only if name not in (*SETS, "all")]:
        raise DttError(f"--only {unknown[0]!r} is nothing to fetch; choose from {', '.join((*SETS, 'all'))}.")
    return [source for source in (*SOURCES, *BENCHMARKS) if "all" in only or source.set in only]


def fetch(
    folder: Path, sources: Iterable[Source] = SOURCES, tell: Callable[[str], None] = lambda _line: None
) -> dict[str, str]:
    """Download what `folder` lacks, and return the SHA-256 of every file by name.

    A download that was interrupted goes on where it stopped: its beginning stays beside the file as `.NAME.part`.

    Args:
        folder: the data folder.
        sources: the files.
        tell: gets one line with name, size, licence and home before each download.

    Raises:
        DttError: a download fails or is not the expected content; files that were complete before stay.
    """
    for source in sources:
        target = folder / source.name
        if target.is_file():
            continue
        tell(f"{source.name}: {source.size / 1e6:.1f} MB, licence: {source.licence}; from {source.url}")
        part = target.with_name(f".{target.name}.part")
        _download(source, part)
        try:
            _check(source, part)
            (source.install or _copy)(part, target)
        finally:
            part.unlink(missing_ok=True)
    return {source.name: sha256_file(folder / source.name) for source in sources}


def _check(source: Source, downloaded: Path) -> None:
    found, expected, kind = "", "", ""
    if source.sha256:
        found, expected, kind = sha256_file(downloaded), source.sha256, "SHA-256"
    elif source.git_blob:
        found, expected, kind = git_blob_hash(downloaded), source.git_blob, "git blob hash"
    if found != expected:
        raise DttError(f"The download of {source.name} has the {kind} {found}, not {expected}; it is not used.")


def git_blob_hash(path: Path) -> str:
    """Return the hash by which git knows the file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(source: Source, part: Path) -> None:
    """Complete the file `part`.

    Raises:
        DttError: it can't be had; what has come so far stays.
    """
    import requests

    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        for url in source.urls:
            with requests.get(url, stream=True, timeout=_TIMEOUT, headers=_range(part)) as response:
                if response.status_code == HTTPStatus.NOT_FOUND and url != source.urls[-1]:
                    continue
                if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is missing
                    return
                response.raise_for_status()
                _append(source, response, part)
                return
    except (requests.RequestException, OSError, ValueError) as error:
        raise DttError(
            f"{source.name} could not be downloaded from {source.url} ({type(error).__name__}); check the network and"
            " run it again, which goes on where it stopped, or copy the file from another machine into the folder that"
            f" {DATA_DIR_VARIABLE} names."
        ) from error


def _range(part: Path) -> dict[str, str]:
    # A compressed answer's bytes are not the file's: a range of them can't be appended.
    size = part.stat().st_size if part.is_file() else 0
    return {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})


def _append(source: Source, response: requests.Response, part: Path) -> None:
    # Status 206: the rest; else the server sends the whole once more.
    mode = "ab" if response.status_code == HTTPStatus.PARTIAL_CONTENT else "wb"
    with part.open(mode) as file, Bar(unit="B", unit_scale=True, desc=source.name, leave=False) as bar:
        for block in response.iter_content(1 << 16):
            if file.tell() + len(block) > _MOST_BYTES:
                raise DttError(f"{source.name} is larger than {_MOST_BYTES >> 20} MB at {source.url}; it is not used.")
            file.write(block)
            bar.update(len(block))
