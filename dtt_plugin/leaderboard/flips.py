"""Two runs record by record: which outcomes flipped."""

from __future__ import annotations

from dataclasses import dataclass

from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.runs import Response, Run


@dataclass(frozen=True)
class Flip:
    """One record under one attack with another outcome in run B than in run A."""

    a: Response
    b: Response

    @property
    def worse(self) -> bool:
        """Whether it happens in B and not in A."""
        return self.b.hit


def check_paired(a: Run, b: Run) -> None:
    """Refuse runs that are not about the same records.

    Raises:
        DttError: another task or other data.
    """
    if (a.task, a.record_ids, a.data_digest) != (b.task, b.record_ids, b.data_digest):
        raise DttError(
            f"{a.path} ({a.task}, {a.n} records) and {b.path} ({b.task}, {b.n} records) are not about the same"
            " records; compare runs of one task over the same data."
        )


def flips(a: Run, b: Run) -> list[Flip]:
    """Return what flipped between two runs on the same records, attack by attack.

    Raises:
        DttError: the runs are not about the same records.
    """
    check_paired(a, b)
    pairs = [(x, y) for x, y in zip(a.responses(), b.responses(), strict=True)]
    order = list(dict.fromkeys(x.attack for x, _ in pairs))
    return sorted([Flip(x, y) for x, y in pairs if x.hit != y.hit], key=lambda flip: order.index(flip.a.attack))
