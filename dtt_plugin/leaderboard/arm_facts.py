"""What a results file tells of the arm that was evaluated: model, defense, tokens, attack."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dtt_plugin.checkpoint.defended import baked_facts
from dtt_plugin.costs import recorded_costs
from dtt_plugin.data.suffixes import other_facts
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.identity import canonical, parse_arguments, read_identity
from dtt_plugin.leaderboard.runs import MOST_FLOPS, UNKNOWN, AttackUsed, Run
from dtt_plugin.leaderboard.samples import (
    prompt_of,
)
from dtt_plugin.leaderboard.untrusted import as_list, as_number, as_table, as_text
from dtt_plugin.prompt.defenses import NONE, TOKENS, parse_defense
from dtt_plugin.public_names import is_hub_model

_FIRST_TOKEN = "[DefensiveToken0]"


class ArmFacts(NamedTuple):
    """What a results file tells of the arm."""

    facts: dict[str, Any]
    """By the dtt_ models."""
    baked: dict[str, Any]
    model: str
    defense: str
    method: str
    bos: str


def arm_facts(path: Path, results: dict[str, Any], task: str, sample: Mapping[str, Any]) -> ArmFacts:
    """Return them; `sample` is one of the run."""
    config, task_config = as_table(results, "config"), as_table(results, "configs", task)
    facts = as_table(config, "dtt_plugin")
    loaded = _model(results, config, facts)
    baked = as_table(facts, "baked") if facts else baked_facts(loaded) or {}
    model = as_text(baked.get("base_model")) or loaded
    bos = as_text(next(iter(as_list(results.get("tokenizer_bos_token"))), ""))
    defense, method = _defense(path, facts, baked, task_config, prompt_of(sample, 0).removeprefix(bos), model)
    return ArmFacts(facts, baked, model, defense, method, bos)


def run_as_told(
    path: Path,
    samples_path: Path,
    results: dict[str, Any],
    task: str,
    told: ArmFacts,
    record_ids: Sequence[int],
    frame: str = "",
) -> Run:
    """Return a run as its results file tells it, without what was measured."""
    task_config, n = as_table(results, "configs", task), len(record_ids)
    sizes = as_table(results, "n-samples", task)
    costs = recorded_costs(as_table(told.baked, "costs") | as_table(told.facts, "costs"))
    limit = as_table(results, "config").get("limit")
    return Run(
        path=path,
        samples=samples_path,
        model=told.model,
        defense=told.defense,
        method=told.method,
        tokens_sha256=as_text(told.facts.get("tokens_sha256")) or as_text(told.baked.get("tokens_sha256")),
        task=task,
        version=str(as_table(results, "versions").get(task))[:50],
        prompt_format=_prompt_format(results, told.facts),
        data_digest="",
        generation=json.dumps(as_table(task_config, "generation_kwargs"), sort_keys=True, ensure_ascii=False),
        limited=sizes["original"] != n if "original" in sizes else limit is not None,
        early_decision=bool(told.facts.get("early_decision")),
        n=n,
        record_ids=tuple(record_ids),
        outcomes={},
        seconds=as_number(results.get("total_evaluation_time_seconds")),
        costs=costs if told.method else {},
        identity=read_identity(results, task, baked=bool(told.baked), frame=frame),
    )


def _model(results: dict[str, Any], config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the model that was loaded."""
    arguments = parse_arguments(config.get("model_args"))
    return (
        as_text(facts.get("model"))
        or as_text(arguments.get("pretrained"))
        or as_text(arguments.get("model"))
        or as_text(results.get("model_name"))
        or "unknown model"
    )


def _defense(
    path: Path,
    facts: dict[str, Any],
    baked: dict[str, Any],
    task_config: dict[str, Any],
    prompt: str,
    model: str,
) -> tuple[str, str]:
    """Return the name of the defense and the method of its tokens.

    `prompt` is one of its prompts, without a BOS in front.
    """
    asked = facts.get("defense") if facts else as_table(task_config, "metadata").get("defense")
    text = None if asked is None else str(asked)
    try:
        names = list(parse_defense(text if text is None or len(text) <= 200 else f"{text[:50]}…"))
    except DttError as error:
        raise DttError(f"{path}: {error}") from error
    method = as_text(facts.get("tokens_method")) if TOKENS in names else ""
    if TOKENS not in names and prompt.startswith(_FIRST_TOKEN):
        # A defended checkpoint whose own template puts its tokens there.
        names.append(TOKENS)
        method = as_text(baked.get("method")) or "baked"
    made_for = as_text(facts.get("tokens_model"))
    if method == "native" and is_hub_model(made_for) and is_hub_model(model) and made_for != model:
        method = "copy"
    shown = [f"{name} ({method or UNKNOWN})" if name == TOKENS else name for name in names]
    return "+".join(shown) or NONE, method


def attack_used(task_config: dict[str, Any], evaluated: dict[str, Any], record_ids: Sequence[int]) -> AttackUsed | None:
    """Return the optimised attack that an adaptive task tells of."""
    told = as_table(task_config, "metadata", "attack")
    name = as_text(told.get("name"))
    if not name:
        return None
    arm = told.get("arm") if isinstance(told.get("arm"), dict) else None
    steps = as_table(told, "steps_to_hit")
    counts = [steps.get(str(record)) for record in record_ids]
    searched = not told.get("search")  # else on other records than these
    return AttackUsed(
        name[:80],
        not other_facts(arm, evaluated),
        as_text((arm or {}).get("defense")),
        as_text((arm or {}).get("tokens_sha256")),
        tuple(map(_count, counts)),
        _count(told.get("n_left_out")) or 0,
        _count(as_table(told, "budget").get("steps")) if searched else None,
        _count(told.get("flops")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < MOST_FLOPS else None


def _prompt_format(results: dict[str, Any], facts: dict[str, Any]) -> str:
    if facts:
        given = parse_arguments(as_table(results, "config").get("model_args")).get("add_bos_token")
        second_bos = canonical(given) in ("true", "1")
        return (as_text(facts.get("prompt_format")) or "unknown") + (", second BOS" if second_bos else "")
    sha = as_text(results.get("chat_template_sha"))
    return f"chat template {sha[:8]}" if sha else "plain text"
