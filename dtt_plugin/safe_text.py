"""Text from models and files, made safe to show: what a reader could not see, or a browser would obey, is spelt out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

# Control characters but tab, line feed and carriage return; the marks that turn the direction
# of what follows; lone surrogates, which no file in UTF-8 can hold; line and paragraph separators;
# characters without a width that no script needs, among them the tags that can spell a hidden text.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which no tokenizer takes and no file in UTF-8 holds."""
_LINE_ENDS = re.compile("[\t\n\r]")


def printable(text: str) -> str:
    """Return `text` with each such character as its code point, for instance `⟨U+202E⟩`."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def one_line(text: str) -> str:
    """Return `text` printable and without the characters that end a line, go back in it, or leave gaps in it."""
    return _LINE_ENDS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", printable(text))


def json_text(value: Any) -> str:
    """Return a value as indented JSON, in which every such character is an escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], text)


def all_printable(value: Any) -> Any:
    """Return a value with `printable` applied to each string in it, keys included, see `with_texts`."""
    return with_texts(value, printable)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value or a dataclass with `change` applied to each string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {with_texts(key, change): with_texts(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_texts(entry, change) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_texts(getattr(value, f.name), change) for f in fields(value)})
    return value
