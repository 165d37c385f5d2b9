"""The discrete search: greedy coordinate steps over one record's suffix, or over one suffix for several records.

GCG (Zou et al., arXiv 2307.15043) as StruQ and SecAlign run it: one token changes a step, and the best candidate is
taken even where it is worse than the current suffix. Several records are joined one by one, each when the suffix
works on those before, and at the latest after its share of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dtt_plugin.attack.candidates import draw
from dtt_plugin.attack.objective import Objective
from dtt_plugin.attack.options import Budget

CURVE_EVERY = 10
_MOST_DRAWS = 4


@dataclass
class Progress:
    """A search that can go on from here."""

    suffix: list[int]
    best: list[int]
    """The suffix of the lowest loss, on the most records so far."""
    generator: str
    """State of the generator, hex."""
    best_loss: float = float("inf")
    step: int = 0
    stage: int = 0
    active: int = 1
    """Records that count so far."""
    curve: list[list[float]] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    """Per record, once the search is over."""
    flops: int = 0

    def enter(self, stage: int) -> None:
        """Go on against another model from the best suffix; losses under the two do not compare."""
        self.stage, self.suffix, self.best_loss = stage, [*self.best], float("inf")

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def begin(start: Sequence[int], seed: str) -> Progress:
    """Return a search that has not begun.

    Args:
        start: the suffix.
        seed: any text.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()) % 2**63)
    return Progress([*start], [*start], _hex(generator))


class Search:
    """A search under one budget.

    Args:
        objectives: one per record, all of the same arm.
        usable: from `usable_tokens`.
        budget: its `steps` are the step at which this search ends.
        greedy: propose by gradient; False: draw at random.
        told: is called after every step with the progress; where it returns False the search stops, to go on later.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        usable: torch.Tensor,
        budget: Budget,
        *,
        greedy: bool,
        told: Callable[[Progress], bool],
    ) -> None:
        self._objectives, self._usable, self._budget = objectives, usable, budget
        self._greedy, self._told = greedy, told

    def run(self, progress: Progress) -> bool:
        """Search until all records are hit or the steps are spent; returns False where it was stopped.

        The suffix that is left in `progress.best` is the one that hit, else the one of the lowest loss.
        """
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray.fromhex(progress.generator), dtype=torch.uint8))
        spent = progress.flops - self._flops()
        while True:
            met, slope = self._read_current(progress)
            before = progress.active
            if (met or progress.step == 0) and self._join(progress):
                progress.best = [*progress.suffix]
                break
            if progress.active > before:
                continue  # to read the suffix on those that joined
            if progress.step >= self._budget.steps:
                break
            self._step(progress, slope, generator)
            progress.step += 1
            share = len(self._objectives) * progress.step // self._budget.steps + 1
            self._widen(progress, min(share, len(self._objectives)))
            progress.generator, progress.flops = _hex(generator), spent + self._flops()
            if not self._told(progress):
                return False
        progress.hits = [self._hit(objective, progress.best) for objective in self._objectives]
        progress.flops = spent + self._flops()
        return True

    def _flops(self) -> int:
        return sum(objective.flops for objective in self._objectives)

    def _active(self, progress: Progress) -> Sequence[Objective]:
        return self._objectives[: progress.active]

    def _read_current(self, progress: Progress) -> tuple[bool, torch.Tensor | None]:
        """Read the current suffix on the active records; returns whether it meets all targets, and its slope."""
        losses, met, slope = [], [], None
        for objective in self._active(progress):
            if self._greedy and progress.step < self._budget.steps:
                found, one = objective.slope(progress.suffix)
                one = one / one.norm()  # of records alike, whatever their losses' scales
                slope = one if slope is None else slope + one
            else:
                found = objective.of_current(progress.suffix)
            losses.append(float(found.loss[0]))
            met.append(bool(found.met[0]))
        loss = sum(losses) / len(losses)
        if loss < progress.best_loss:
            progress.best, progress.best_loss = [*progress.suffix], loss
        at_end = progress.step >= self._budget.steps or all(met)
        if progress.step % CURVE_EVERY == 0 or at_end:
            point = [progress.step, round(loss, 4)]
            if not progress.curve or progress.curve[-1][0] != progress.step:
                progress.curve.append(point)
        return all(met), slope

    def _join(self, progress: Progress) -> bool:
        """Take more records in while the current suffix works; returns whether it works on all of them."""
        while True:
            if not all(self._hit(objective, progress.suffix) for objective in self._active(progress)):
                return False
            if progress.active == len(self._objectives):
                return True
            self._widen(progress, progress.active + 1)

    def _widen(self, progress: Progress, active: int) -> None:
        if active > progress.active:
            progress.active = active
            progress.best_loss = float("inf")  # losses on fewer records do not compare

    def _hit(self, objective: Objective, suffix: Sequence[int]) -> bool:
        return objective.is_hit_by(suffix)

    def _step(self, progress: Progress, slope: torch.Tensor | None, generator: torch.Generator) -> None:
        """Take the best of the candidates that can be sent."""
        active = self._active(progress)
        candidates: list[list[int]] = []
        for _ in range(_MOST_DRAWS):
            drawn = draw(progress.suffix, self._usable, self._budget, generator, slope)
            likely = [s for s, good in zip(drawn, active[0].place.likely(drawn), strict=True) if good]
            candidates += [suffix for suffix in likely if suffix not in candidates]
            if len(candidates) >= self._budget.candidates:
                break
        candidates = candidates[: self._budget.candidates]
        if not candidates:
            return
        total = sum(objective.of_candidates(candidates).loss for objective in active)
        assert isinstance(total, torch.Tensor)
        for index in total.argsort(stable=True).tolist():
            if all(objective.place.admits(candidates[index]) for objective in active):
                progress.suffix = candidates[index]
                return


def _hex(generator: torch.Generator) -> str:
    return bytes(generator.get_state().tolist()).hex()
