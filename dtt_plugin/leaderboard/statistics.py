"""Intervals and tests for rates over the same records. SciPy's special functions; no sampling but the bootstrap's.

Sources: Clopper and Pearson, Biometrika 26, 1934 (exact interval); McNemar, Psychometrika
12, 1947, in its exact form; Holm, Scand. J. Statist. 6, 1979; Efron's percentile bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
RESAMPLES = 10_000
SEED = 20_260
# With fewer hits or misses than this, resampling cannot show how far the truth may lie.
FEW = 10

Floats = NDArray[np.float64]
Outcomes = NDArray[np.bool_]


@dataclass(frozen=True)
class Rate:
    """A share of the records with its 95 % interval; a published figure has neither counts nor interval."""

    hits: int | None
    n: int
    rate: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; the rate twice where it has none."""
        return (self.rate if self.low is None else self.low, self.rate if self.high is None else self.high)


@dataclass(frozen=True)
class Maximum(Rate):
    """ASR(max): the highest of the attacks' rates, with an interval for the maximum."""

    attack: str | None = None
    """Which attack it is."""
    interval: str | None = None
    """Whether its interval is "exact" or of the "bootstrap"."""


def clopper_pearson(hits: int, n: int, *, lower_alpha: float = ALPHA / 2) -> tuple[float, float]:
    """Return the exact interval of a rate; 95 % by default.

    Args:
        hits: of `n`.
        n: at least 1.
        lower_alpha: the chance that the truth lies below the interval; above it, 2.5 %.
    """
    from scipy.special import betaincinv

    low = 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, lower_alpha))
    high = 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, 1 - ALPHA / 2))
    return low, high


def rate(outcomes: Outcomes) -> Rate:
    """Return hits, n, rate and the exact 95 % interval of 0/1 outcomes (n,)."""
    hits, n = int(outcomes.sum()), len(outcomes)
    low, high = clopper_pearson(hits, n)
    return Rate(hits, n, hits / n, low, high)


def mcnemar(before: Outcomes, after: Outcomes) -> tuple[float, float]:
    """Compare two 0/1 outcomes of the same records, each (n,).

    Returns:
        The difference of the rates, after minus before, and the exact two-sided p.
    """
    from scipy.special import bdtr

    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p = 1.0 if gained == lost else min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    return (gained - lost) / len(before), p


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_difference(n: int, tests: int = 1) -> float | None:
    """Return the smallest difference of two rates on `n` paired records that McNemar's test can separate.

    That is the best case: no record changes the other way. With `tests` tests in Holm's family, the
    smallest that is separated even where all others are noise. None where `n` records separate nothing.
    """
    for changed in range(1, n + 1):
        if 2 * 0.5**changed * tests < ALPHA:
            return changed / n
    return None


class Resamples:
    """Bootstrap samples of n records, the same for every run, so that differences stay paired."""

    def __init__(self, n: int, *, seed: int = SEED, size: int = RESAMPLES) -> None:
        """Draw `size` samples of `n` records with replacement, as counts."""
        self._weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=size).astype(np.float32) / n

    def asr_max(self, hacked: Outcomes) -> Floats:
        """Return ASR(max) in each sample, (size,), of outcomes (n, attacks)."""
        rates: Floats = (self._weights @ hacked.astype(np.float32)).max(axis=1).astype(np.float64)
        return rates


def percentiles(values: Floats) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of bootstrap values."""
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def asr_max(hacked: Outcomes, attacks: Sequence[str], resampled: Floats) -> Maximum:
    """Return the highest of the attacks' rates with a 95 % interval for the maximum.

    The bootstrap resamples records and takes the maximum anew in each sample. With fewer than `FEW` hits or
    misses of the worst attack it would hardly move (not at all at 0/n); the interval is then exact: the
    truth is at least every attack's rate, so its lower end is Clopper-Pearson's with Bonferroni's correction
    for the number of attacks; and at most the highest upper end over attacks, which needs no correction.

    Args:
        hacked: (n, attacks).
        attacks: their names.
        resampled: `Resamples.asr_max` of the same.
    """
    hits = hacked.sum(axis=0)
    worst = int(hits.argmax())
    n, most = len(hacked), int(hits[worst])
    few = min(most, n - most) < FEW
    interval = clopper_pearson(most, n, lower_alpha=ALPHA / 2 / len(attacks)) if few else percentiles(resampled)
    return Maximum(most, n, most / n, *interval, attack=attacks[worst], interval="exact" if few else "bootstrap")


def ratio_interval(
    ratio: Callable[..., Any],
    points: Sequence[Rate],
    resampled: Sequence[Floats | float],
) -> tuple[float, float] | None:
    """Return the 95 % interval of a ratio of three values of ASR(max).

    The bootstrap over records, all three from the same samples; where one of them has an exact interval
    (see `asr_max`), widened to the ratio at that interval's ends, so that no 0/n passes for certainty.

    Args:
        ratio: of three values.
        points: `asr_max` of each.
        resampled: of each; a number for a published figure.

    Returns:
        None where so many samples have a denominator of zero that the ratio has no interval.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(ratio(*resampled), np.float64)
    values = values[~np.isnan(values)]
    if not values.size or not np.isfinite(percentiles(values)).all():
        return None
    ends = list(percentiles(values))
    centre = [point.rate for point in points]
    for index, point in enumerate(points):
        if isinstance(point, Maximum) and point.interval == "exact":
            for end in point.ends:
                moved = float(ratio(*centre[:index], end, *centre[index + 1 :]))
                ends = [min(ends[0], moved), max(ends[1], moved)]
    return ends[0], ends[1]
