"""Reading a YAML file that a person wrote by hand: small, flat, and without references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dtt_plugin.errors import DttError
from dtt_plugin.safe_text import HALF_PAIR

_LARGEST_NBYTES = 1 << 20
_DEEPEST, _MOST_VALUES = 20, 20_000
# An unquoted word may become a number, whose digits cost more than their characters.
_LONGEST_WORD, _LONGEST_TEXT = 1_000, 100_000


def read_plain_yaml(path: Path) -> Any:
    """Return the value in the YAML file `path`.

    A few bytes of aliases stand for gigabytes, so anchors and aliases are refused, like whatever else makes a
    small file cost much, and a key that is there twice.

    Raises:
        DttError: the file is too large, can't be read, or is not such YAML.
    """
    try:
        if not path.is_file():
            raise DttError(f"{path} is not a file; give a YAML file.")
        if path.stat().st_size > _LARGEST_NBYTES:
            raise DttError(f"{path} is larger than {_LARGEST_NBYTES >> 20} MiB; split it.")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except DttError as error:
        raise DttError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DttError(f"{path} can't be read as YAML ({reason}); see docs/sweep.md.") from error


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without what the file's length does not bound."""

    _depth = _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise DttError(
                f"line {line}: anchors and aliases (&name, *name) are no plain values; write the values out."
            )
        if isinstance(event, yaml.ScalarEvent):
            is_text = event.style is not None and event.tag is None
            if len(event.value) > (_LONGEST_TEXT if is_text else _LONGEST_WORD):
                raise DttError(f"line {line}: this value is too long; shorten it, or put it in quotes.")
            if HALF_PAIR.search(event.value):
                raise DttError(f"line {line}: this text holds half a character (U+D800 to U+DFFF); correct it.")
        if self._depth == _DEEPEST:
            raise DttError(f"line {line}: lists and tables are nested more than {_DEEPEST} deep; flatten them.")
        self._values += 1
        if self._values > _MOST_VALUES:
            raise DttError(f"line {line}: the file holds more than {_MOST_VALUES} values; split it.")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    line = key.start_mark.line + 1
                    raise DttError(f"line {line}: the key {key.value!r} is there twice; remove one of the two.")
                names.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
