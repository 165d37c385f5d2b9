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

A conversation is more than one text: contents in parts, fields, tool calls,
documents. `Neutraliser` breaks every string of it, keys included, and keeps a
token from forming where a template puts two of them next to each other, trimmed
or not. Baked chat templates do the same in jinja (`formats.neutralising_prelude`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

from dtt_plugin.errors import DttError

DEFENSIVE_TOKEN_PREFIX = "[DefensiveToken"
"""Broken as a prefix, so that every arm treats a text alike, whatever its number of tokens."""

_TRUSTED_ROLES = frozenset({"system", "developer"})
# Role names that templates know. Other roles are accepted where they can't be a piece of a control token.
_USUAL_ROLES = frozenset({"assistant", "function", "ipython", "observation", "tool", "user"})

_SEPARATORS = (" ", "_", "\u2009")
# Time grows with the cube of a token that repeats itself; real ones have at most some dozens of characters.
_LONGEST = 128
_BORDERS = ("-", "~", ".", ":", ";", "\u00b7")
DEEPEST = 40
"""Levels of lists and mappings in a message, a document or a tool; what is nested deeper is refused."""


class Neutralised(NamedTuple):
    """A text without control tokens, and how many occurrences were broken."""

    text: str
    occurrences: int


def trusted_roles(*, trust_assistant: bool = False) -> frozenset[str]:
    """Return the roles whose messages are not untrusted data; any other is (user, tool, Llama 3's ipython ...).

    What an assistant said comes back from a client, and a model can be made to write the text of a control
    token out of ordinary ones. So it counts as data, unless `trust_assistant`.
    """
    return _TRUSTED_ROLES | {"assistant"} if trust_assistant else _TRUSTED_ROLES


def control_texts(added_tokens: Iterable[str]) -> list[str]:
    """Return what to break in untrusted text, longest first.

    White-space tokens (some tokenizers add runs of spaces or newlines) are ordinary text and left out.

    Raises:
        DttError: a token is so long that breaking it could take minutes.
    """
    texts = {token for token in added_tokens if token.strip()}
    if too_long := [token for token in texts if len(token) > _LONGEST]:
        raise DttError(
            f"The tokenizer has an added token of {len(max(too_long, key=len))} characters, {too_long[0][:20]!r}...; "
            f"at most {_LONGEST} are supported: correct its files."
        )
    texts.add(DEFENSIVE_TOKEN_PREFIX)
    return sorted(texts, key=lambda token: (-len(token), token))


def separator_for(controls: Sequence[str]) -> str:
    """Return a character that stands in none of `controls`, so that inserting it can't form one.

    Raises:
        DttError: there is none among the candidates.
    """
    return _absent(_SEPARATORS, controls)


def border_for(controls: Sequence[str]) -> str:
    """Return the same for the border of two texts: a character that no template trims away.

    Raises:
        DttError: there is none among the candidates.
    """
    return _absent(_BORDERS, controls)


def _absent(candidates: Sequence[str], controls: Sequence[str]) -> str:
    for separator in candidates:
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


def without_spaces(text: str) -> str:
    """Return `text` without white space."""
    return "".join(text.split())


def strings_in(value: Any) -> Iterator[str]:
    """Return every string in lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from strings_in(item)


def all_controls(controls: Sequence[str]) -> str:
    """Return the controls without white space, a border in front of each and behind the last.

    So border + x in it asks whether a control begins with x, and x + border whether one ends with it.
    """
    border = border_for(controls)
    return without_spaces(border + border.join(controls) + border)


def known_roles(controls: Sequence[str], template: str | None) -> list[str]:
    """Return the roles to accept though they may be a piece of a control token, as `user` is one of `<|user|>`.

    They are the usual ones, and those that the template compares with: the words that it quotes.
    """
    pieces = all_controls(controls)
    quoted = {word for word in re.findall(r"""["'](\w+)["']""", template or "") if word in pieces}
    return sorted((_USUAL_ROLES | quoted) - _TRUSTED_ROLES)


class Neutraliser:
    """Breaks control tokens in everything untrusted of one conversation.

    A template may put any two strings next to each other: parts, the messages of a turn, a document's title and
    text. It may trim them, or put white space in between. So each string is compared with all those before it,
    white space left out: where the end of one and the start of another are a control token together, a border
    is put between them.

    Args:
        controls: from `control_texts`.
        template: the chat template that will follow; see `known_roles`.
        trust_assistant: leave assistant messages as they are.
    """

    def __init__(self, controls: Sequence[str], *, template: str | None = None, trust_assistant: bool = False) -> None:
        self.occurrences = 0
        """Control tokens broken so far."""
        self._controls = controls
        self._separator, self._border = separator_for(controls), border_for(controls)
        self._all = all_controls(controls)
        self._longest = max(map(len, controls))
        self._trusted = trusted_roles(trust_assistant=trust_assistant)
        self._roles = known_roles(controls, template)
        # Where strings so far end with the start of a control, or start with its end.
        self._tails: list[str] = []
        self._heads: list[str] = []
        self._middles: list[str] = []  # or are a piece of one that may stand between the two

    def messages(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the conversation with every string of its untrusted messages neutralised, keys included.

        Raises:
            DttError: a message is no mapping, is nested too deep, or has a role that is a piece of a control token.
        """
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise DttError("A message of the conversation is no mapping with role and content.")
        if message.get("role") in tuple(self._trusted):
            return dict(message)
        if "role" in message:
            self._check_role(message["role"])
        return {
            key if key in ("role", "content") else self._key(key): item if key == "role" else self.value(item)
            for key, item in message.items()
        }

    def _check_role(self, role: object) -> None:
        if not isinstance(role, str) or (
            role not in self._roles and (self.text(role) != role or without_spaces(role) in self._all)
        ):
            raise DttError(f"The role {role!r} is no text, or a piece of a control token; use another role.")

    def value(self, value: Any, depth: int = 1) -> Any:
        """Return `value` with every string in it neutralised: in lists, mappings and their keys.

        Raises:
            DttError: it is nested too deep.
        """
        if depth > DEEPEST:
            raise DttError(f"Untrusted data is nested more than {DEEPEST} levels deep; flatten it.")
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.value(item, depth + 1) for key, item in value.items()}
        if value is None or isinstance(value, bool) or callable(value):
            return value
        if isinstance(value, Number):
            text = self.text(str(value))
            return value if text == str(value) else text
        if isinstance(value, Iterable):
            return [self.value(item, depth + 1) for item in value]
        return self.text(str(value))

    def _key(self, key: Any) -> Any:
        return self.value(key if key is None or isinstance(key, str | Number) else str(key))

    def text(self, text: str) -> str:
        """Return `text` with its control tokens broken, and borders where it would form one with another string."""
        text, occurrences = neutralise(text, self._controls, self._separator)
        self.occurrences += occurrences
        border, known = self._border, self._all
        flat = without_spaces(text).replace(border, "\n")  # a border is no piece of a control, nor is a line feed here
        if not flat:
            return text
        sizes = range(1, 1 + min(len(flat), self._longest))
        heads = [flat[:n] for n in sizes if flat[:n] + border in known]
        tails = [flat[-n:] for n in sizes if border + flat[-n:] in known]
        front = any(border + tail + head + border in known for tail in self._tails for head in heads)
        back = any(border + tail + head + border in known for tail in tails for head in self._heads)
        if flat in known:  # a middle piece, which makes pieces longer
            front = front or any(
                border + tail + flat + head + border in known for tail in self._tails for head in self._heads
            )
            tails += [tail + flat for tail in self._tails if border + tail + flat in known]
            heads += [flat + head for head in self._heads if flat + head + border in known]
        self.occurrences += front + back
        middles = self._middles
        tails += [tail + middle for tail in tails for middle in middles if border + tail + middle in known]
        heads += [middle + head for head in heads for middle in middles if middle + head + border in known]
        if flat in known and flat not in middles and not front and not back:
            middles.append(flat)
        if not front:
            self._heads += [head for head in dict.fromkeys(heads) if head not in self._heads]
        if not back:
            self._tails += [tail for tail in dict.fromkeys(tails) if tail not in self._tails]
        return border * front + text + border * back
