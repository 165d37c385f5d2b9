"""By what the evaluation's texts are recognised, so that no training sees them.

The AlpacaFarm records and the attack sentences may not be shipped, so their digests are: of a text's
letters and digits, and of the passages of words that give it away inside another text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from dtt_plugin.data.records import ASSETS, PLACEHOLDER, IgnoreSentences, Record
from dtt_plugin.files.digests import sha256_bytes

FILE = ASSETS / "separation.json"
INJECTED_WORD = "hacked"
"""What the evaluation injects."""
_SHORTEST = 6  # words; shorter passages ("Barack Obama") say nothing about where a text comes from
_WORD = re.compile(r"[^\W_]+")


def holds_evaluation_record(record: Record) -> bool:
    """Return whether a record is one of AlpacaFarm's evaluation set, or quotes one's data or whole prompt.

    Compared are letters and digits, or runs of words: case, Unicode form, punctuation and spaces hide nothing.
    """
    if _essence(record["instruction"], record["input"]) in _known("record_essences"):
        return True
    return any(_holds(text, "record_passages") for text in record.values() if isinstance(text, str))


def holds_evaluation_sentence(text: str) -> bool:
    """Return whether a text is or quotes a sentence of the evaluation's ignore attack; compared as above."""
    return _essence(text) in _known("sentence_essences") or _holds(text, "sentence_passages")


def holds_injected_word(text: str) -> bool:
    """Return whether the letters and digits of a text hold the word that the evaluation injects."""
    return INJECTED_WORD in _letters(text)


def digests(records: Sequence[Record], sentences: IgnoreSentences) -> dict[str, Any]:
    """Return the content of `FILE`, from the evaluation's data."""
    prompts = [f"{record['instruction']} {record['input']}" for record in records]
    return {
        "record_essences": sorted({_essence(record["instruction"], record["input"]) for record in records}),
        "record_passages": _passages([*prompts, *(record["input"] for record in records)]),
        "sentence_essences": sorted({_essence(sentence) for sentence in sentences.test}),
        "sentence_passages": _passages([sentence.replace(PLACEHOLDER, "") for sentence in sentences.test]),
    }


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, _folded(text)))


def _words(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    # Soft hyphens and characters without width divide no word.
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", visible).casefold()


def _essence(*texts: str) -> str:
    """Return a digest that texts share whose letters and digits agree, in whichever order."""
    return _digest(sorted(map(_letters, texts)))


def _passages(texts: Sequence[str]) -> dict[str, list[list[Any]]]:
    """Return, by the digest of its first words, every text's number of words and digest."""
    found: dict[str, list[list[Any]]] = {}
    for text in texts:
        words = _words(text)
        if len(words) >= _SHORTEST:
            passage = [len(words), _digest(words)]
            same_beginning = found.setdefault(_digest(words[:_SHORTEST]), [])
            if passage not in same_beginning:
                same_beginning.append(passage)
    return found


def _holds(text: str, kind: str) -> bool:
    return any(_digest(words) == digest for words, digest in _candidates(_words(text), _known(kind)))


def _candidates(words: list[str], passages: dict[str, list[list[Any]]]) -> Iterator[tuple[list[str], str]]:
    for start in range(len(words) - _SHORTEST + 1):
        for length, digest in passages.get(_digest(words[start : start + _SHORTEST]), ()):
            yield words[start : start + length], digest


def _digest(value: Any) -> str:
    return sha256_bytes(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))[:16]


@cache
def _known(kind: str) -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))[kind]
