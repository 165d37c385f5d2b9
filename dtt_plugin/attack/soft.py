"""The soft attack: free vectors in the suffix's place.

No text can send them, so this is no threat by itself. It is an upper bound on what a suffix of this length can do:
where vectors do not hit either, more search would not help; where they do, a search that fails was too short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dtt_plugin.attack.objective import Objective
from dtt_plugin.attack.search import CURVE_EVERY

RATE = 0.1
"""Adam's learning rate, in root mean squares of the vocabulary's vectors."""


class SoftResult(NamedTuple):
    """Where the vectors ended."""

    loss: float
    """The lowest."""
    steps: int
    hit: bool
    curve: list[list[float]]


def soft_attack(objective: Objective, steps: int) -> SoftResult:
    """Optimise vectors by Adam, from those of the suffix that a search would start from, until the target is met."""
    embed = objective.soft_prompt.embed
    with torch.no_grad():
        device = embed.weight.device
        start = embed(torch.tensor([objective.place.start], device=device)).float()  # (1, suffix, d)
        scale = float(embed.weight[:4096].float().pow(2).mean().sqrt()) * objective.soft_prompt.scale
    vectors = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=RATE * scale)
    curve: list[list[float]] = []
    best, hit, step = float("inf"), False, 0
    while True:
        losses = objective.of_vectors(vectors.to(embed.weight.dtype))
        loss = float(losses.loss.detach()[0])
        best = min(best, loss)
        hit = (bool(losses.met[0]) or step in (0, steps)) and _is_hit(objective, vectors)
        if step % CURVE_EVERY == 0 or hit or step == steps:
            curve.append([step, round(loss, 4)])
        if hit or step == steps:
            return SoftResult(best, step, hit, curve)
        (vectors.grad,) = torch.autograd.grad(losses.loss.sum(), vectors)
        objective.count_backward()
        optimizer.step()
        step += 1


def _is_hit(objective: Objective, vectors: torch.Tensor) -> bool:
    typed = vectors.detach()[0].to(objective.soft_prompt.embed.weight.dtype)
    return objective.is_hit(typed)
