"""A report without the paths of the machine that made it, for publishing."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dtt_plugin.leaderboard.geometry import Geometry
from dtt_plugin.leaderboard.identity import told_apart
from dtt_plugin.public_names import public_name

# An absolute path, or one below somebody's home, in running text; where spaces would end it, `Public` knows it already.
_PATH = re.compile(r"(?<![\w.~:/\\-])(?:~[\w.-]*|file://)?/(?:[^\s/,;:'\"()<>|]+/)*([^\s/,;:'\"()<>|]*)")


class Public:
    """Names for a published page: hub ids as they are, of every path the last part."""

    def __init__(self, models: Iterable[str], geometries: Sequence[Geometry] = (), inputs: Iterable[Path] = ()) -> None:
        """Choose the names of models, no two the same, and of the files and folders that were read."""
        names = told_apart([*models, *(geometry.model for geometry in geometries)])
        paths = {str(path): public_name(str(path)) for path in inputs}
        homes = {os.path.expanduser("~"): "~"}
        known = {name: shown for name, shown in (homes | paths | names).items() if name.strip("./~")}
        self._known = {name: known[name] for name in sorted(known, key=len, reverse=True)}

    def all_of(self, value: Any) -> Any:
        """Return a JSON value with `text` applied to each string in it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.all_of(entry) for key, entry in value.items()}
        return [self.all_of(entry) for entry in value] if isinstance(value, list) else value

    def text(self, text: str) -> str:
        """Return `text` without paths."""
        for name, shown in self._known.items():
            if "/" in name:
                text = text.replace(name, shown)
        return _PATH.sub(lambda match: match[1] or "/", text)
