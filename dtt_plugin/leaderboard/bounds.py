"""Soft attacks beside the runs: what vectors in a suffix's place reached in the optimiser.

Nothing can send them, so no run of lm-eval confirms them: they bound what a suffix could do, and are no ASR.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dtt_plugin.data.suffixes import SOFT, Suffix, read_attacks
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard import statistics
from dtt_plugin.leaderboard.board import Bound
from dtt_plugin.leaderboard.runs import MOST_FLOPS, Run, arm_called

ENDING = ".attacks.jsonl"
"""Of the files of attacks that are found in folders."""
_MOST_STEPS = 10_000_000


def read_bound(path: Path) -> Bound:
    """Read a file of soft attacks.

    Raises:
        DttError: no such file, one with suffixes, whose rate is lm-eval's to tell, or one without any record.
    """
    attacks = read_attacks(path)
    if attacks.method != SOFT:
        raise DttError(
            f"{path} ({attacks.name}) holds suffixes, whose rate lm-eval tells: evaluate them with an adaptive task of"
            " the benchmark, and give its output folder. Only soft attacks are read from their file."
        )
    arm, steps = attacks.arm or {}, attacks.budget.get("steps")
    if not attacks.suffixes or type(steps) is not int or not 0 < steps <= _MOST_STEPS:
        raise DttError(f"{path} has no record, or no number of steps in its budget; run `dtt attack` again.")
    if wrong := [one.record_id for one in attacks.suffixes if not _is_tried(one, steps)]:
        raise DttError(f"{path}: record {wrong[0]} lacks its steps or its outcome; run `dtt attack` again.")
    hits = [one.steps if one.hit else None for one in attacks.suffixes]
    return Bound(
        model=str(arm.get("model") or "unknown model"),
        task=attacks.task,
        arm=str(arm.get("defense") or "an unknown arm"),
        tokens_sha256=str(arm.get("tokens_sha256") or ""),
        attack=attacks.name,
        finished=bool(attacks.finished),
        n_records=attacks.n_records,
        rate=statistics.rate(np.array([step is not None for step in hits])),
        curve=hits_by_step(hits, steps),
        flops=attacks.flops if type(attacks.flops) is int and 0 <= attacks.flops < MOST_FLOPS else None,
        file=str(path),
    )


def _is_tried(one: Suffix, steps: int) -> bool:
    return one.hit is not None and one.steps is not None and 0 <= one.steps <= steps


def hits_by_step(hits: Sequence[int | None], budget: int) -> tuple[tuple[int, float], ...]:
    """Return after which steps which share of the records was hit: at 0, wherever it grows, and at the budget's end.

    Args:
        hits: per record, the step at which it was hit; None: not within the budget.
        budget: steps.
    """
    steps = np.array([budget + 1 if step is None else step for step in hits])
    return tuple((at, float((steps <= at).mean())) for at in sorted({0, budget, *steps[steps <= budget].tolist()}))


def named(bounds: Iterable[Bound], runs: Sequence[Run]) -> tuple[Bound, ...]:
    """Return bounds whose arms are called as the runs call them."""
    return tuple(replace(bound, arm=arm_called(bound.arm, bound.tokens_sha256, runs)) for bound in bounds)


def optimiser_of(run: Run) -> tuple[tuple[int, float], ...]:
    """Return what the optimiser reached step by step on a run's own arm and records."""
    attack = run.attack
    if attack is None or not attack.own or not attack.steps or attack.budget_steps is None:
        return ()
    return hits_by_step(attack.steps, attack.budget_steps)
