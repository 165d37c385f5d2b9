"""What finished runs measured, kept without any text, so that any machine can go on from there and make the page.

A folder an experiment: an outcome file a run, named MODEL--DEFENSE[--ARM], and
`probes/ARM.json` and `log-likelihoods/ARM.json`. Beside them `tokens`, what was trained.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtt_plugin.files.replacing import write_json
from dtt_plugin.leaderboard.lm_eval_files import read_run
from dtt_plugin.leaderboard.outcome_files import ENDING, write_outcomes
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.sweep.file import Cell

OUTCOMES = Path(__file__).parents[2] / "docs" / "results" / "outcomes"

PROBES, LIKELIHOODS, TOKENS = "probes", "log-likelihoods", "tokens"
Probes = dict[str, dict[str, Any]]
"""Figures of `dtt probe` by arm."""


class Kept:
    """The folder of all experiments, `OUTCOMES` in the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_there(self, name: str, cell: Cell) -> bool:
        """Return whether an experiment keeps a cell's outcomes: of the same tokens and as many records."""
        file = self._file(name, cell)
        if not file.is_file():
            return False
        run, tokens = read_run(file), cell.load.tokens
        limit = cell.load.settings.get("limit")
        return run.tokens_sha256 == (tokens.digest(cell.load.model) if tokens else "") and limit in (run.n, None)

    def keep(self, name: str, cell: Cell, finished: Path) -> None:
        """Keep what a cell measured, `finished` being its folder of lm-eval's output."""
        file = self._file(name, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_outcomes(file, [read_run(finished)])

    def _file(self, name: str, cell: Cell) -> Path:
        return self.folder / name / f"{cell.name}{ENDING}"

    def runs(self, name: str) -> dict[str, Run]:
        """Return an experiment's runs by arm: a token file's name, or a defense; they are labelled so, too."""
        files = sorted((self.folder / name).glob(f"*{ENDING}"))
        arms = {file.name.removesuffix(ENDING).rsplit("--", 1)[-1]: file for file in files}
        return {arm: replace(read_run(file), label=arm) for arm, file in arms.items()}

    def names(self, experiment: str) -> list[str]:
        """Return an experiment's folders, for instance E3-40-64 of E3."""
        found = (folder.name for folder in self.folder.glob(f"{experiment}*") if folder.is_dir())
        return sorted(name for name in found if name.split("-")[0] == experiment)

    def keep_probe(self, name: str, arm: str, facts: dict[str, Any]) -> None:
        """Keep what the probe told of an arm."""
        self._keep(name, PROBES, arm, facts)

    def probes(self, name: str) -> Probes:
        """Return an experiment's probes by arm."""
        return self._all(name, PROBES)

    def keep_likelihoods(self, name: str, arm: str, values: list[float]) -> None:
        """Keep an arm's log-likelihoods, nats a token of each record's reference answer."""
        self._keep(name, LIKELIHOODS, arm, values)

    def likelihoods(self, name: str) -> dict[str, list[float]]:
        """Return an experiment's log-likelihoods by arm."""
        return self._all(name, LIKELIHOODS)

    def keep_tokens(self, *files: Path) -> None:
        """Keep what a training left."""
        (self.folder / TOKENS).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, self.folder / TOKENS)

    def fetch_tokens(self, *files: Path) -> bool:
        """Put what a training left where it is wanted; return whether all of it is kept."""
        found = [self.folder / TOKENS / file.name for file in files]
        if not all(file.is_file() for file in found):
            return False
        for file, wanted in zip(found, files, strict=True):
            shutil.copy(file, wanted)
        return True

    def trained(self) -> list[Path]:
        """Return the kept token files."""
        return sorted((self.folder / TOKENS).glob("*.safetensors"))

    def _keep(self, name: str, kind: str, arm: str, content: Any) -> None:
        folder = self.folder / name / kind
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{arm}.json", content)

    def _all(self, name: str, kind: str) -> dict[str, Any]:
        files = sorted((self.folder / name / kind).glob("*.json"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
