"""Strings that others' attackers made, as a file of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dtt_plugin import __version__
from dtt_plugin.attack.benchmark import load_benchmark
from dtt_plugin.attack.options import AttackOptions
from dtt_plugin.data.records import read_json
from dtt_plugin.data.suffixes import IMPORTED, AttackFile, Suffix, record_digest, records_digest, write_attacks
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_bytes


class Imported(NamedTuple):
    """What was taken over."""

    file: AttackFile
    broken: int | None
    """Suffixes in which a model's control tokens will be broken; None: no model was named."""


def import_strings(path: Path, options: AttackOptions) -> Imported:
    """Write strings as suffixes to `options.out`, behind a space: one for all chosen records, or one for each.

    Against which arm they were made is not known, so that the evaluation calls them transferred.

    Args:
        path: a text a line, or a JSON list of texts where the file's name ends in .json.
        options: `out`, `task`, `records` and `start` count, and `model` where it is not empty.

    Raises:
        DttError: no such file, or as many texts as fit no choice of records.
    """
    benchmark = load_benchmark(options.task, options.own)
    chosen = options.chosen(len(benchmark.records))
    texts = _texts(path)
    if len(texts) not in (1, len(chosen)):
        raise DttError(
            f"--import {path} holds {len(texts)} strings, and {len(chosen)} records are chosen; give one string for all"
            " of them, or one for each."
        )
    if options.out.exists():
        raise DttError(f"{options.out} already exists; name another --out.")
    texts = [text if text[:1].isspace() else f" {text}" for text in texts]
    each = texts * len(chosen) if len(texts) == 1 else texts
    suffixes = tuple(
        Suffix(number, record_digest(benchmark.records[number]), text)
        for number, text in zip(chosen, each, strict=True)
    )
    file = AttackFile(
        method=IMPORTED,
        task=options.task,
        records_sha256=records_digest(benchmark.records),
        injected_prompt=benchmark.injected_prompt,
        start=options.start,
        arm=None,
        n_records=len(benchmark.records),
        budget={"name": path.stem},
        versions={"dtt_plugin": __version__},
        suffixes=suffixes,
    )
    broken = _broken(each, options.model) if options.model else None
    write_attacks(options.out, file)
    return Imported(file, broken)


def _texts(path: Path) -> list[str]:
    if path.suffix == ".json":
        texts = read_json(path)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DttError(f"--import {path} is no JSON list of strings; correct it.")
    else:
        try:
            texts = read_bytes(path).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DttError(f"--import {path} can't be read as text in UTF-8 ({error}); correct it.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DttError(f"--import {path} holds no string.")
    return texts


def _broken(texts: list[str], model: str) -> int:
    from dtt_plugin.prompt.control_tokens import control_texts, neutralise, separator_for
    from dtt_plugin.prompt.hf_tokenizer import hf_tokenizer

    controls = control_texts(hf_tokenizer(model).get_added_vocab())
    separator = separator_for(controls)
    return sum(neutralise(text, controls, separator).occurrences > 0 for text in texts)
