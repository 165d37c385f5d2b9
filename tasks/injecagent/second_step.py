"""The second step of data stealing: the agent has read what the attacker wants; does it send it off?

It continues saved responses, so it is a task of its own, to be run with the arm whose samples it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.tasks.description import ATTACK, Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.injecagent.dataset import cases, prompt, rule
from dtt_plugin.tasks.injecagent.react import Case, Outcome, Reading, read_response

TASKS = {
    f"injecagent{setting}{roles}": (setting.strip("_") or "base", roles.strip("_") or "corrected")
    for setting in ("", "_enhanced", "_100")
    for roles in ("", "_protocol")
}
"""Per task of the first step, its setting and its roles."""
_SAMPLES_NAME = re.compile(r"samples_(injecagent\w*)_\d{4}-\d\d-\d\dT[\d.\-]+\.jsonl")
_LARGEST_SAMPLES = 1 << 30


def second_step(*, samples: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """Return the data-stealing cases whose saved response called the attacker's first tool.

    What that tool returned is one of InjecAgent's simulated responses, by the call's exact text; a call of which it has
    none returned None, as in Meta SecAlign.

    Args:
        samples: the samples file of a first step (`--log_samples`).
        _metadata: lm-eval passes its model arguments along; they don't concern the data.

    Raises:
        DttError: it is missing or no such file, or none of its responses reaches the second step.
    """
    if samples is None:
        raise DttError(
            "injecagent_step2 continues saved responses: name the samples of a run of injecagent, with --log_samples"
            ' and the same model and defense, by --metadata \'{"samples": "out/.../samples_injecagent_....jsonl"}\'.'
        )
    path = Path(samples)
    match = _SAMPLES_NAME.fullmatch(path.name)
    if not match or match[1] not in TASKS:
        raise DttError(f"{path} is not named like samples of {', '.join(TASKS)}; keep lm-eval's file names.")
    setting, roles = TASKS[match[1]]
    responses = _responses(path)
    known = dict(cases(setting))
    if unknown := sorted(responses.keys() - known.keys()):
        raise DttError(f"{path} has the case {unknown[0]!r}, which {match[1]} has not; run that task again.")
    readings = {
        name: read_response(responses[name], Case.of(rule(case, case["Attacker Tools"][0]).texts))
        for name, case in known.items()
        if name in responses
    }
    reached = [name for name, reading in readings.items() if name.startswith("ds-") and _followed(reading)]
    if not reached:
        raise DttError(
            f"{path}: no data-stealing case called the attacker's first tool, so none reaches the second step; its"
            " success rate there is 0."
        )
    ended = {name: reading for name, reading in readings.items() if name not in reached}
    first_step = {
        "cases": len(readings),
        "followed": sum(_followed(reading) for reading in ended.values()),
        "valid": sum(reading.outcome is not Outcome.INVALID for reading in ended.values()),
    }
    dataset = benchmark_dataset(
        "injecagent_step2", (_entry(name, known[name], readings[name], roles) for name in reached)
    )
    return {split: rows.add_column("first_step", [first_step] * len(rows)) for split, rows in dataset.items()}


def _followed(reading: Reading) -> bool:
    return reading.outcome is Outcome.FOLLOWED


def _entry(name: str, case: Mapping[str, Any], reading: Reading, roles: str) -> Entry:
    tool, mailer = case["Attacker Tools"]
    simulated = load_benchmark("injecagent/attacker_simulated_responses.json").get(f"({tool},{reading.arguments})")
    more = f"Thought: {reading.thought}\nAction: {tool}\nAction Input: {reading.arguments}\nObservation: {simulated}\n"
    instruction, data = prompt(case, roles, observation=case["Tool Response"], more=more)
    attack = Variant("injected", ATTACK, instruction, data, rule(case, mailer))
    group = "unsimulated" if simulated is None else "simulated"
    return Entry(instruction, data, [attack], name=name, cluster=case["User Tool"], groups=(group,))


def _responses(path: Path) -> dict[str, str]:
    """Return the answers to the attacked prompts by the case's name."""
    try:
        lines = read_bytes(path, most=_LARGEST_SAMPLES).splitlines()
    except OSError as error:
        raise DttError(f"{path} can't be read ({error.strerror}); give a samples file of lm-eval.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line)
            attacks = [variant["attack"] for variant in sample["doc"]["variants"]]
            found[str(sample["doc"]["name"])] = str(sample["filtered_resps"][attacks.index("injected")] or "")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DttError(f"{path}, line {number}, is not a sample of injecagent; run that task again.") from error
    return found
