"""Download the benchmark data from its own homes and check every byte that is used.

Nothing downloaded is executed: the attack sentences are read out of a Python
source file as a literal.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE, load_records, load_sentences
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.files.replacing import replacing

_SENTENCES_NAME = "IGNORE_ATTACK_SENTENCES"


@dataclass(frozen=True)
class Source:
    """One file of the data folder and where it comes from."""

    name: str
    url: str
    licence: str
    install: Callable[[Path, Path], None]
    """(downloaded file, file to write): checks the first and writes the second."""


def _install_records(downloaded: Path, target: Path) -> None:
    load_records(downloaded)
    _copy(downloaded, target)


def _install_sentences(downloaded: Path, target: Path) -> None:
    extracted = downloaded.with_suffix(".json")
    extracted.write_text(literal_sentences(downloaded), encoding="utf-8")
    load_sentences(extracted)
    _copy(extracted, target)


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
    except DttError:
        raise
    # Python's parser ends in one of the last three on nested or unhashable literals.
    except (SyntaxError, ValueError, StopIteration, TypeError, RecursionError, MemoryError) as error:
        raise DttError(f"The download of {SENTENCES_FILE} has no literal {_SENTENCES_NAME} any more.") from error


def _install_tokens(downloaded: Path, target: Path) -> None:
    expected = "e82e56dd1b98822b99f3a3ba5b010eeadf5f92d0ca6885009d8e80306c2e6081"
    if (found := sha256_file(downloaded)) != expected:
        raise DttError(f"The download of {TOKENS_FILE} has the SHA-256 {found}, not {expected}; it is not used.")
    _copy(downloaded, target)


def _copy(downloaded: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(downloaded.read_bytes())


SOURCES = (
    Source(
        RECORDS_FILE,
        "https://huggingface.co/datasets/hamishivi/alpaca-farm-davinci-003-2048-token/resolve/main/davinci_003_outputs.json",
        "CC BY-NC 4.0",
        _install_records,
    ),
    Source(
        SENTENCES_FILE,
        "https://raw.githubusercontent.com/facebookresearch/Meta_SecAlign/main/config.py",
        "CC BY-NC 4.0",
        _install_sentences,
    ),
    Source(
        TOKENS_FILE,
        "https://raw.githubusercontent.com/Sizhe-Chen/DefensiveToken/main/defensivetokens.json",
        "CC BY-NC 4.0",
        _install_tokens,
    ),
)


def fetch(folder: Path, sources: Iterable[Source] = SOURCES) -> dict[str, str]:
    """Download what `folder` lacks, and return the SHA-256 of every file by name.

    Raises:
        DttError: a download fails or is not the expected content; files that were complete before stay.
    """
    for source in sources:
        if not (folder / source.name).is_file():
            with tempfile.TemporaryDirectory() as work:
                source.install(_download(source, Path(work)), folder / source.name)
    return {source.name: sha256_file(folder / source.name) for source in sources}


def _download(source: Source, work: Path) -> Path:
    import pooch
    import requests

    try:
        return Path(pooch.retrieve(source.url, known_hash=None, fname="download", path=work, progressbar=True))
    except (requests.RequestException, OSError, ValueError) as error:
        raise DttError(
            f"{source.name} could not be downloaded from {source.url} ({type(error).__name__}); check the network, or"
            " copy the file from another machine into the folder that DTT_DATA_DIR names."
        ) from error
