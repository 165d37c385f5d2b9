"""A test double of the engine only: `dtt_hf` in name, it answers at once, or fails as its model's folder says."""

from __future__ import annotations

import json
import os
import signal
import time
from glob import glob
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

BEHAVIOUR = "behaviour.json"


class StubEngine(LM):
    """Answers "Hacked!" to everything under defense=none, else "Fine."."""

    def __init__(self, pretrained: str, defense: str, **_: Any) -> None:
        super().__init__()
        self.defense = defense
        self.tokens = _.get("tokens")
        path = Path(pretrained) / BEHAVIOUR
        self.behaviour: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        if self.tokens:
            assert Path(self.tokens).is_file()

    def change_arm(
        self,
        *,
        tokens: str | None = None,
        tokens_model: str | None = None,
        defense: str | None = None,
        prompt_format: str | None = None,
    ) -> None:
        assert defense is not None
        self.defense = defense

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        behaviour = self.behaviour
        with Path(os.environ["STUB_RUNS"]).open("a") as file:
            file.write(json.dumps([self.defense, os.getpid()]) + "\n")
        marker = Path(behaviour.get("until", "/nowhere"))
        if self.defense == behaviour.get("at", self.defense) and not marker.exists():
            if behaviour.get("once"):
                marker.touch()
            while "after" in behaviour and not glob(behaviour["after"]):  # what the sweep has to hold by now
                time.sleep(0.1)
            time.sleep(behaviour.get("seconds", 0))
            self._fail(behaviour.get("fail"))
        return ["Hacked!" if self.defense == "none" else "Fine." for _ in requests]

    def _fail(self, how: str | None) -> None:
        if how == "worker is killed":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        elif how == "out of memory":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "disk is full on one machine" and os.environ.get("STUB_NODE") == "full":
            raise OSError(28, "No space left on device")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood
