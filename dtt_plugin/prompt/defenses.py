"""Defenses: the names a user may combine, and those that stand in the prompt, applied to a conversation."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.defense_texts import PROMPT_DEFENSES

TOKENS = "tokens"
NONE = "none"

Message = dict[str, Any]
"""One chat message: `role` and `content`."""


def parse_defense(spec: str | None, *, default: str = NONE) -> tuple[str, ...]:
    """Return the defenses that `spec` names, in canonical order; the empty tuple is no defense.

    Args:
        spec: "none", "tokens", a name of `PROMPT_DEFENSES`, or several joined by "+".
        default: what an absent spec means.

    Raises:
        DttError: an unknown name (the nearest known one is suggested), or "none" together with another.
    """
    names = str(default if spec is None else spec).split("+")
    known = (NONE, *PROMPT_DEFENSES, TOKENS)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
            raise DttError(f"defense={spec!r}: {name!r} is not a defense; {hint}")
    if NONE in names and len(names) > 1:
        raise DttError(f"defense={spec!r}: 'none' can't be combined with another defense.")
    return tuple(name for name in (*PROMPT_DEFENSES, TOKENS) if name in names)


def apply_prompt_defenses(messages: Sequence[Message], defenses: Collection[str]) -> list[Message]:
    """Return `messages` under the prompt defenses among `defenses`; the given messages are left as they are.

    The trusted instruction is the system message, the untrusted data are the last user message.

    Raises:
        DttError: a prompt defense is asked for and there is no system or no user message to apply it to.
    """
    return add_trusted_words(mark_data(messages, defenses), defenses)


def mark_data(messages: Sequence[Message], defenses: Collection[str]) -> list[Message]:
    """Return `messages` with the untrusted data encoded, marked or set in quotes, as `defenses` want it.

    This is the first half of `apply_prompt_defenses`. A mark may complete a control token, so that they are broken
    behind it and before the second half, `add_trusted_words`.

    Raises:
        DttError: as `apply_prompt_defenses`.
    """
    marked = list(messages)
    wanted = [name for name in PROMPT_DEFENSES if name in defenses and PROMPT_DEFENSES[name].mark]
    if wanted:
        _, place = _instruction_and_data(messages, wanted)
        data = messages[place]["content"]
        for name in wanted:
            if mark := PROMPT_DEFENSES[name].mark:
                data = mark(data)
        marked[place] = {**messages[place], "content": data}
    return marked


def add_trusted_words(messages: Sequence[Message], defenses: Collection[str]) -> list[Message]:
    """Return `messages` with the words that `defenses` put beside the instruction and behind the data.

    Raises:
        DttError: as `apply_prompt_defenses`.
    """
    defended = [dict(message) for message in messages]
    wanted = [name for name in PROMPT_DEFENSES if name in defenses]
    if wanted:
        system, user = (defended[place] for place in _instruction_and_data(messages, wanted))
        instruction = system["content"]
        for name in wanted:
            if instruct := PROMPT_DEFENSES[name].instruct:
                system["content"] = instruct(system["content"], instruction)
            if close := PROMPT_DEFENSES[name].close:
                user["content"] += close(instruction)
    return defended


def _instruction_and_data(messages: Sequence[Message], wanted: Sequence[str]) -> tuple[int, int]:
    """Return the places of the system message and of the last user message, both of text."""
    places = {role: [i for i, message in enumerate(messages) if message["role"] == role] for role in ("system", "user")}
    if not all(places.values()):
        raise DttError(
            f"defense={'+'.join(wanted)} needs a system message (the trusted instruction) and a user message"
            " (the untrusted data); this task gives none, so the defense can't be applied to it."
        )
    found = places["system"][0], places["user"][-1]
    if not all(isinstance(messages[place]["content"], str) for place in found):
        raise DttError(f"defense={'+'.join(wanted)} needs messages whose content is text, not parts.")
    return found
