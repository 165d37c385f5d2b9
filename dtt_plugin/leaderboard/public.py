"""A report without the paths of the machine that made it, for publishing."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dtt_plugin.leaderboard.board import Leaderboard
from dtt_plugin.leaderboard.labels import told_apart
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import with_texts
from dtt_plugin.tokens.geometry import Geometry

_PART = r"[^\s/,;:'\"()<>|]"
# A path in running text, where spaces would end it (`Public` knows those that have some): absolute, or below somebody's
# home; and lm-eval's files below any folder, since it names folders after the model's path.
_PATH = re.compile(rf"(?<![\w.~:/\\-])(?:~[\w.-]*|file://)?/(?:{_PART}+/)*({_PART}*)")
_FILE = r"(?:results|samples)_[^\s/]*\d{4}-\d\d-\d\dT[\d.\-]+\.jsonl?"
_BELOW = re.compile(rf"(?:{_PART}+/)+({_FILE})")


class Public:
    """Names for a published page: hub ids as they are, of every path the last part."""

    def __init__(
        self,
        models: Iterable[str],
        geometries: Sequence[Geometry] = (),
        inputs: Iterable[Path] = (),
        files: Iterable[str] = (),
    ) -> None:
        """Choose the names.

        Args:
            models: the rows' models; no two get the same name.
            geometries: likewise among themselves.
            inputs: the files and folders that were read, as the user named them.
            files: the results files that were found there.
        """
        names = told_apart(geometry.model for geometry in geometries) | told_apart(models)
        folders = {f"{os.path.dirname(file)}/": "" for file in files}
        given = {str(path): public_name(str(path)) for path in inputs}
        known = {name: shown for name, shown in (given | folders | names).items() if "/" in name.strip(".")}
        known[os.path.expanduser("~")] = "~"
        self._known = {name: known[name] for name in sorted(known, key=len, reverse=True)}
        self._below = [re.compile(rf"{re.escape(name)}/[^\n]*?({_FILE})") for name in given if "/" in name]

    def all_of(self, board: Leaderboard) -> Leaderboard:
        """Return a leaderboard with `text` applied to each string in it."""
        public: Leaderboard = with_texts(board, self.text)
        return public

    def text(self, text: str) -> str:
        """Return `text` without paths."""
        for below in self._below:
            text = below.sub(r"\1", text)
        for name, shown in self._known.items():
            text = text.replace(name, shown)
        return _PATH.sub(lambda path: path[1] or "/", _BELOW.sub(r"\1", text))
