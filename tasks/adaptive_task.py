"""The lm-eval task class of adaptive attacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtt_plugin.data.suffixes import covered
from dtt_plugin.tasks.adaptive import attacks_to_send
from dtt_plugin.tasks.injection import InjectionTask


class AdaptiveTask(InjectionTask):
    """An injection task with the variant of a file of attacks; the results say which file, against which arm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        metadata = dict(self.config.metadata or {})
        attacks = attacks_to_send(metadata.get("attacks", ""))
        header = attacks.header()
        facts = {name: header[name] for name in ("method", "budget", "start", "arm", "finished", "flops", "search")}
        facts["name"] = attacks.name
        # What a rate against steps is made of; None: no hit within the budget, or not tried on that record.
        facts["steps_to_hit"] = {str(one.record_id): one.steps if one.hit else None for one in attacks.suffixes}
        facts["n_left_out"] = len(set(range(attacks.n_records)) - covered(attacks.suffixes).keys())
        self.config.metadata = {**metadata, "attack": facts}
