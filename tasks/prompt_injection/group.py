"""The group `prompt_injection`: lm-eval's own groups name their tasks once and for all, this one looks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group

from dtt_plugin.errors import MissingDataError

logger = logging.getLogger(__name__)
_TASKS = Path(__file__).parents[1]


class GroupAtHand(Group):
    """A group of those members that can be loaded.

    Args:
        config: of the YAML: `task`, the group's name; `members`, a list of tasks, or of lists of which the first that
            is at hand stands for all (a whole benchmark and its subset); `metadata`, which lm-eval adds.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        metadata = config.get("metadata") or {}
        super().__init__(name=config["task"], metadata=dict(metadata))
        manager = TaskManager(include_path=str(_TASKS), include_defaults=False, metadata=dict(metadata))
        left_out = []
        for member in config["members"]:
            names = [member] if isinstance(member, str) else member
            if not any(self._load(manager, name) for name in names):
                left_out.append(names[0])
        if left_out:
            logger.warning(
                "%s runs %s; left out, because their data or a package is not at hand: %s. Get it with"
                " `dtt fetch --only all` and pip install 'dtt-plugin[benchmarks]', and for injection_records with"
                " --metadata '{\"records\": FILE}'.",
                self.name,
                ", ".join(self.child_names),
                ", ".join(left_out),
            )

    def _load(self, manager: Any, name: str) -> bool:
        """Add a task, and return whether its data is at hand."""
        try:
            self.add(manager.load(name)["tasks"][name])
        except MissingDataError:
            return False
        return True
