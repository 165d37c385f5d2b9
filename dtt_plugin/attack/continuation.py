"""Weaker forms of an arm's tokens, to be attacked one after the other, each from the suffix that the last one left.

The idea is Checkpoint-GCG's (arXiv 2505.15738): follow a defense from where it is weak to where it is strong. For
DefensiveTokens the strength is the rows' length, or the step of their training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.training.soft_prompt import SoftPrompt

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Of the rows' length; at 0 there are no rows."""


def weaker(arm: SoftPrompt, along: Sequence[Path]) -> list[SoftPrompt]:
    """Return the arm under weaker tokens, the weakest first.

    Args:
        arm: with its own tokens.
        along: token files, as `dtt train --eval-every` keeps them; none: the arm's own rows, shortened.

    Raises:
        DttError: a file holds tokens of another shape.
    """
    rows = arm.rows.detach()
    if not along:
        return [SoftPrompt(arm.model, rows * share if share else rows[:0]) for share in SHARES]
    found = []
    for path in along:
        tokens = load_tokens(path)
        if tokens.rows.shape != rows.shape:
            raise DttError(
                f"--along {path} holds {tokens.k} x {tokens.width} values, the arm's tokens are {len(rows)} x"
                f" {rows.shape[1]}; give files of the same training run."
            )
        found.append(SoftPrompt(arm.model, torch.from_numpy(tokens.rows.copy())))
    return found
