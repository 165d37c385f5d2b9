"""Texts that are no control token and that a tokenizer may take for one.

A normaliser can turn other text into a control token (full-width letters under
NFKC, capitals under lower-casing, a zero-width space that is removed), so that
breaking the token's own text does not help. No list of normalisers decides
about that: each token's look-alikes are encoded, and the ids tell.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.control_tokens import control_texts, neutralise, separator_for

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# White space of every kind, U+2581 and U+0120 as tokenizers spell it, and what no reader sees: zero widths, joiners,
# marks of direction, variation selectors, tag characters, soft hyphen, control characters, combining marks.
_SPACES = "\t\n\x0b\r\x1f\x85\xa0\u1680\u2002\u2009\u200a\u2028\u202f\u205f\u3000\u2581\u0120 "
_UNSEEN = (
    "\x00\x01\x7f\x9f\xad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u202e\u2060\u2064\u2069\u3164\ufe0f\ufeff"
    "\ufff9\ufffd\U000e0001\U000e0020\U000e0100\u0300\u0301\u0308\u0327\u0338\u20dd"
)
# Beyond so many tokens, those that differ in a number only (Gemma's <unused17>) are probed once.
_MANY = 1024
_NO_TOKEN = "\U000f1b5d"
"""A character for private use, which no vocabulary has."""


class Disguise(NamedTuple):
    """A text without the control token `token` that is encoded to it, or a pattern of such texts."""

    text: str
    token: str


def first_disguise(tokenizer: Tokenizer, controls: Mapping[str, int]) -> Disguise | None:
    """Return the first look-alike of a control token that `tokenizer` encodes to one; None where there is none.

    Look-alikes that hold a control token's own text are broken first, as untrusted data are.

    Args:
        tokenizer: of the library `tokenizers`; `backend_tokenizer` of a transformers tokenizer.
        controls: control token to id, the DefensiveTokens among them where there are any. Tokens of white space
            alone are ordinary text.

    Raises:
        DttError: no separator could break the tokens, or there are texts that the tokenizer can't encode.
    """
    texts = control_texts(controls)
    separator = separator_for(texts)
    names = {token_id: token for token, token_id in controls.items() if token.strip()}
    reversals = _reversals(tokenizer)
    probed = [
        [probe for token in some for probe in (*look_alikes(token, separator), *_reversed(token, reversals))]
        for some in _in_groups(_different(list(names.values())))
    ]
    for probes in probed:
        suspects = [text for text, ids in _encoded(tokenizer, probes) if not names.keys().isdisjoint(ids)]
        safe = [neutralise(text, texts, separator).text for text in suspects]
        for text, ids in _encoded(tokenizer, safe):
            if found := [token_id for token_id in ids if token_id in names]:
                return Disguise(text, names[found[0]])
    return _by_pattern(tokenizer, names.values())


def unknown_token_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that stand for a character which the vocabulary lacks; anyone can write such a character."""
    ((_, ids),) = _encoded(tokenizer, [_NO_TOKEN])
    return set(ids)


def look_alikes(token: str, separator: str = " ") -> list[str]:
    """Return texts other than `token` that a normaliser may turn into it."""
    head, tail = token[:1], token[1:]
    letter = next((index for index, character in enumerate(token) if character.isalpha()), 0) + 1
    texts = {token.upper(), token.lower(), token.title(), token.swapcase(), token.casefold()}
    texts.add(head + separator + tail)  # as untrusted data are broken
    for character in _SPACES + _UNSEEN:
        at = letter if unicodedata.combining(character) else 1
        texts.add(token[:at] + character + token[at:])
        if any(space in token for space in " \u2581"):
            texts.add(token.replace(" ", character).replace("\u2581", character))
    texts |= {token.replace(" ", ""), token.replace("\u2581", ""), "\u200b".join(token), "\u0301".join(token)}
    for table in _single_forms().values():
        texts |= {token.translate(table), token.upper().translate(table)}
    texts |= {token.replace(plain, form) for plain, form in _ligatures() if plain in token}
    texts.add("".join(chr(0xE0000 + ord(character)) if character < "\x7f" else character for character in token))
    return sorted(texts - {token})


@cache
def _single_forms() -> dict[str, dict[int, str]]:
    """Return per kind of compatibility form (wide, font, circle ..., canonical) a table from character to form."""
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    for number in range(0xA0, 0x20000):
        decomposition = unicodedata.decomposition(chr(number)).split()
        kind = decomposition[0] if decomposition and decomposition[0].startswith("<") else "canonical"
        codes = decomposition[kind != "canonical" :]
        # Of a letter with an accent the letter counts: normalisers may strip accents.
        if codes and (len(codes) == 1 or kind == "canonical"):
            tables[kind].setdefault(int(codes[0], 16), chr(number))
    return dict(tables)


@cache
def _ligatures() -> tuple[tuple[str, str], ...]:
    """Return characters that stand for several, as (several, one): fi, st, (a), 10, ..."""
    pairs = []
    for number in range(0xA0, 0x20000):
        plain = unicodedata.normalize("NFKC", chr(number))
        if len(plain) > 1 and plain.isascii() and plain.strip():
            pairs.append((plain, chr(number)))
    return tuple(pairs)


def _reversals(tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return what the normaliser makes out of what: result to two sources at most; of "" to four.

    Every assigned character is tried, and every plain text that a Replace names.
    """
    normalizer = tokenizer.normalizer
    found: dict[str, list[str]] = defaultdict(list)
    if normalizer is None:
        return found
    front = normalizer.normalize_str("xx").removesuffix("x")
    for number in range(0x30000):
        character = chr(number)
        if unicodedata.category(character) in ("Cn", "Co", "Cs"):
            continue
        result = normalizer.normalize_str(f"x{character}x")
        if result.startswith(front) and result.endswith("x") and len(result) > len(front):
            result = result[len(front) : -1]
            if result != character and len(found[result]) < (2 if result else 4):
                found[result].append(character)
    for replaced, result in _replacements(tokenizer, "String"):
        found[result].append(replaced)
    return found


def _by_pattern(tokenizer: Tokenizer, tokens: Collection[str]) -> Disguise | None:
    """Return a token that text of a pattern may be turned into: what a pattern matches can't be listed."""
    normalised = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.normalized}
    if type(tokenizer.model).__name__ == "Unigram":  # which finds tokens in text that is normalised
        normalised |= {*tokens}
    for pattern, result in _replacements(tokenizer, "Regex"):
        for token in sorted(normalised.intersection(tokens)):
            if result in token or "$" in result:
                return Disguise(pattern, token)
    return None


def _replacements(tokenizer: Tokenizer, kind: str) -> Iterator[tuple[str, str]]:
    """Yield (replaced, result) of every Replace in the normaliser whose pattern is of a kind, String or Regex."""

    def search(part: Any) -> Iterator[tuple[str, str]]:
        for inner in part.get("normalizers", ()):
            yield from search(inner)
        pattern = part.get("pattern")
        if isinstance(pattern, dict) and kind in pattern:
            yield pattern[kind], part["content"]

    if tokenizer.normalizer is not None:
        yield from search(json.loads(tokenizer.normalizer.__getstate__()))


def _reversed(token: str, reversals: Mapping[str, Sequence[str]]) -> list[str]:
    texts = []
    for result, sources in reversals.items():
        if result == "":
            texts += [token[:1] + source + token[1:] for source in sources]
        elif result in token:
            texts += [token.replace(result, source) for source in sources]
    return texts


def _different(tokens: list[str]) -> list[str]:
    if len(tokens) <= _MANY:
        return tokens
    return list({re.sub(r"\d+", "0", token): token for token in tokens}.values())


def _in_groups(tokens: list[str], size: int = 64) -> Iterator[list[str]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[str, list[int]]]:
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # tokenizers raises plain Exception
        raise DttError(
            f"The tokenizer can't encode every text ({error}), so untrusted data could stop it; use another model."
        ) from error
    return zip(texts, (encoding.ids for encoding in encodings), strict=True)
