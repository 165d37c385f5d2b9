"""Every prompt defense as an arm: the same prompts in our wrappers and in others, a name in tables and grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.prompt.defense_texts import PROMPT_DEFENSES
from dtt_plugin.sweep.file import read_sweep
from tests import conftest
from tests.lm_eval_output import planted, write_run

COMBINED = "+".join(PROMPT_DEFENSES)


def prompts(model: str, tiny: str, *, metadata: dict[str, Any] | None = None, **arguments: Any) -> list[str]:
    results = conftest.evaluate(
        model,
        {"pretrained": tiny, "dtype": "float32", "max_length": 4096, **arguments},
        metadata=metadata,
        limit=1,
        apply_chat_template=True,
    )
    return [request[0] for request in results["samples"]["injection_demo"][0]["arguments"]]


def test_a_defense_makes_the_same_prompt_in_every_model_class(tiny: str) -> None:
    ours = prompts("dtt_hf", tiny, defense=COMBINED)
    assert ours == prompts("hf", tiny, metadata={"defense": COMBINED})
    assert len(set(ours)) == 4
    assert set(ours).isdisjoint(prompts("dtt_hf", tiny))


@pytest.mark.parametrize("defense", [*PROMPT_DEFENSES, COMBINED])
def test_tables_and_grids_know_the_name(defense: str, tmp_path: Path) -> None:
    attacks = {attack: planted(3, 8) for attack in ("ignore", "completion", "ignore_completion")}
    write_run(tmp_path / "run", outcomes=attacks, refusal=planted(0, 8), defense=defense)
    (run,), problems = read_runs([tmp_path / "run"])
    assert (run.defense, problems) == (defense, [])
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"grid": [{"models": ["m"], "defenses": ["none", defense]}]}))
    assert [cell.defense for cell in read_sweep(sweep)] == ["none", defense]
