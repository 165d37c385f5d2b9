"""Text from models and files, made safe to show: what a reader could not see, or a browser would obey, is spelt out."""

from __future__ import annotations

import re
from typing import Any

# Control characters but tab, line feed and carriage return; the marks that turn the direction
# of what follows; lone surrogates, which no file in UTF-8 can hold; line and paragraph separators.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Return `text` with each such character as its code point, for instance `⟨U+202E⟩`."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def all_printable(value: Any) -> Any:
    """Return a JSON value with `printable` applied to each string in it, keys included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {all_printable(key): all_printable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(entry) for entry in value]
    return value
