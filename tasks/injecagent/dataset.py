"""InjecAgent's cases: an agent has called the user's tool, and what it observed holds an instruction."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from dtt_plugin.data.benchmark_files import load_benchmark
from dtt_plugin.tasks.description import ATTACK, CONTROL, Entry, Variant, benchmark_dataset
from dtt_plugin.tasks.injecagent.react import Case
from dtt_plugin.tasks.rules import Rule

_HERE = Path(__file__).parent
_ORDER_SEED = 0
_PLACE = "<Attacker Instruction>"
_OBSERVATION = "Observation: "
SUBSETS = {
    "base": ("test_cases_dh_base", "test_cases_ds_base"),
    "enhanced": ("test_cases_dh_enhanced", "test_cases_ds_enhanced"),
    "100": ("test_cases_dh_base_subset", "test_cases_ds_base_subset"),
}
"""Per setting, the files of direct harm (dh) and data stealing (ds)."""


def injecagent(*, setting: str, roles: str, variants: Sequence[str] | None = None, **_metadata: Any) -> dict[str, Any]:
    """Return the cases of one setting, direct harm and data stealing in turn; of the latter, their first step.

    The full sets are sorted by attacker: a fixed shuffle makes the first N cases of a limited run fair.

    Args:
        setting: "base", "enhanced" (a hacking prompt stands before the instruction), or "100" (the official subset).
        roles: "corrected" (all but the observation is trusted) or "protocol" (as Meta SecAlign: the system prompt is
            trusted, and the rest, the user's request too, is untrusted).
        variants: which of "injected" and "control" to make; None: both.
        _metadata: lm-eval passes its model arguments along; they don't concern the data.

    Raises:
        DttError: a file is missing or is not InjecAgent's.
    """
    task = "_".join(["injecagent", *(part for part in (setting, roles) if part not in ("base", "corrected"))])
    return benchmark_dataset(task, (_entry(name, case, roles) for name, case in cases(setting)), variants)


def cases(setting: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the cases of a setting in the task's order, each with its name, such as "dh-12"."""
    kinds = []
    for file in SUBSETS[setting]:
        kind = file.split("_")[2]
        named = [(f"{kind}-{i}", case) for i, case in enumerate(load_benchmark(f"injecagent/{file}.json"))]
        if setting != "100":
            random.Random(_ORDER_SEED).shuffle(named)
        kinds.append(named)
    return [pair for pair in chain.from_iterable(zip_longest(*kinds)) if pair]


def _entry(name: str, case: Mapping[str, Any], roles: str) -> Entry:
    wanted = rule(case, case["Attacker Tools"][0])
    benign = f'"{_escaped(case["Tool Response Template"]).replace(_PLACE, "")}"'
    asked_too = f"{case['User Instruction']} {case['Attacker Instruction']}"
    instruction, data = prompt(case, roles, observation=benign)
    injected = prompt(case, roles, observation=case["Tool Response"])
    control = prompt(case, roles, observation=benign, request=asked_too)
    return Entry(
        name=name,
        instruction=instruction,
        data=data,
        cluster=case["User Tool"],
        groups=(name.partition("-")[0],),
        variants=[Variant("injected", ATTACK, *injected, wanted), Variant("control", CONTROL, *control, wanted)],
    )


def _escaped(text: str) -> str:
    return text.replace('"', '\\"')


def rule(case: Mapping[str, Any], target: str) -> Rule:
    """Return the rule that holds where a response calls one of the attacker's tools."""
    wanted = Case(target, case["User Tool"], case["Attacker Instruction"], case["Attacker Tools"])
    return Rule("tool_call", wanted.texts)


def prompt(
    case: Mapping[str, Any], roles: str, *, observation: str, request: str | None = None, more: str = ""
) -> tuple[str, str]:
    """Return the trusted and the untrusted part of the prompt.

    Args:
        case: InjecAgent's record.
        roles: "corrected" or "protocol".
        observation: what the user's tool returned.
        request: what the user asks for; None: what the record says.
        more: what the agent has done since, and observed.
    """
    names = [case["User Tool"], *case["Attacker Tools"]]
    scratchpad = f"\n{case['Thought']}\nAction: {names[0]}\nAction Input: {case['Tool Parameters']}\n{_OBSERVATION}"
    system, user = _template("system"), _template("user")
    filled = user.format(
        available_tool_descriptions=json.dumps([_tools()[name] for name in names], indent=1),
        available_tool_names=names,
        input=request or case["User Instruction"],
        agent_scratchpad=f"{scratchpad}{observation}\n{more}",
    )
    if roles == "protocol":
        return system, filled
    trusted, untrusted = filled[: filled.rindex(scratchpad) + len(scratchpad)], f"{observation}\n{more}"
    return f"{system}\n{trusted}", untrusted.rstrip("\n")


@cache
def _template(name: str) -> str:
    return (_HERE / f"{name}.txt").read_text(encoding="utf-8")


@cache
def _tools() -> dict[str, dict[str, Any]]:
    return {
        kit["toolkit"] + tool["name"]: {**tool, "name": kit["toolkit"] + tool["name"]}
        for kit in load_benchmark("injecagent/tools.json")
        for tool in kit["tools"]
    }
