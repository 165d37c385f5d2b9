"""Untrusted text must never become control tokens.

A control token is every added token of a tokenizer (chat markers, tool markers,
reserved tokens; Llama-3's `all_special_tokens` misses its header markers, so the
special ones are not enough) and every DefensiveToken name. Tokenizers match
them anywhere in a text. `neutralise` breaks each occurrence by a separator
behind its first character.

Why nothing can re-form: the separator stands in no control token, so an
occurrence in the result contains none; it would have to be an occurrence in the
original text, and all of those are broken. Deleting, as the published filter
does, lacks this: `<|eot<|eot_id|>_id|>` becomes `<|eot_id|>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dtt_plugin.errors import DttError

DEFENSIVE_TOKEN_PREFIX = "[DefensiveToken"
"""Broken as a prefix, so that every arm treats a text alike, whatever its number of tokens."""

TRUSTED_ROLES = frozenset({"system", "developer", "assistant"})
"""The message roles whose content is not untrusted data; any other is (user, tool, Llama 3's ipython ...)."""

_SEPARATORS = (" ", "_", "\u2009")


class Neutralised(NamedTuple):
    """A text without control tokens, and how many occurrences were broken."""

    text: str
    occurrences: int


def control_texts(added_tokens: Iterable[str]) -> list[str]:
    """Return what to break in untrusted text, longest first.

    White-space tokens (some tokenizers add runs of spaces or newlines) are ordinary text and left out.
    """
    texts = {token for token in added_tokens if token.strip()}
    texts.add(DEFENSIVE_TOKEN_PREFIX)
    return sorted(texts, key=lambda token: (-len(token), token))


def separator_for(controls: Sequence[str]) -> str:
    """Return a character that stands in none of `controls`, so that inserting it can't form one.

    Raises:
        DttError: there is none among the candidates.
    """
    for separator in _SEPARATORS:
        if not any(separator in control for control in controls):
            return separator
    raise DttError("The tokenizer's added tokens use every separator that could break them in untrusted data.")


def neutralise(text: str, controls: Sequence[str], separator: str) -> Neutralised:
    """Break every occurrence of `controls` in `text`.

    Args:
        text: untrusted data.
        controls: from `control_texts`.
        separator: from `separator_for`.
    """
    count = 0
    for control in controls:
        while control in text:  # again where occurrences overlap each other
            count += text.count(control)
            text = text.replace(control, broken(control, separator))
    return Neutralised(text, count)


def broken(control: str, separator: str) -> str:
    """Return `control` as it stands in neutralised text; a single character is dropped for the separator."""
    return control[0] + separator + control[1:] if len(control) > 1 else separator
