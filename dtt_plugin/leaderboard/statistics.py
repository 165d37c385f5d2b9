"""Intervals and tests for rates over the same records. SciPy's special functions; no sampling but the bootstrap's.

Sources: Clopper and Pearson, Biometrika 26, 1934 (exact interval); McNemar, Psychometrika
12, 1947, in its exact form; Korn and Graubard, Survey Methodology 24, 1998 (clustered records); Holm, Scand. J.
Statist. 6, 1979; Efron's percentile bootstrap.
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
Ints = NDArray[np.int64]


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
    """Whether its interval is "exact", of the "bootstrap", or made for records that are "clustered"."""


def clopper_pearson(hits: float, n: float, *, lower_alpha: float = ALPHA / 2) -> tuple[float, float]:
    """Return the exact interval of a rate; 95 % by default.

    Args:
        hits: of `n`.
        n: the records, or the independent ones that these are worth.
        lower_alpha: the chance that the truth lies below the interval; above it, 2.5 %.
    """
    from scipy.special import betaincinv

    low = 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, lower_alpha))
    high = 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, 1 - ALPHA / 2))
    return low, high


def rate(values: Outcomes | Floats, clusters: Ints | None = None) -> Rate:
    """Return hits, n, rate and the 95 % interval of one value per record (n,): 0, 1, a share of both; NaN for none.

    Independent records with 0 or 1 have the exact interval. Where records are alike within clusters, or a record's
    value is a share, the interval is Korn and Graubard's: the exact one for the number of independent records that
    would be as uncertain as these.

    Args:
        values: at least one of them no NaN.
        clusters: (n,), the number of each record's cluster; None: each record is its own.
    """
    numbers = np.asarray(values, np.float64)
    known = ~np.isnan(numbers)
    numbers, n = numbers[known], int(known.sum())
    whole = bool(np.isin(numbers, (0, 1)).all())
    hits, share = int(numbers.sum()), float(numbers.mean())
    if whole and clusters is None:
        return Rate(hits, n, hits / n, *clopper_pearson(hits, n))
    effective = _effective(numbers, np.arange(n) if clusters is None else clusters[known], whole)
    ends = clopper_pearson(share * effective, effective) if effective else (0.0, 1.0)
    return Rate(hits if whole else None, n, share, *ends)


def _effective(numbers: Floats, clusters: Ints, whole: bool) -> float:
    """Return how many independent 0/1 records are as uncertain as these; 0 where one cluster tells nothing."""
    from scipy.stats import t

    n, share = len(numbers), float(numbers.mean())
    _, places = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(places, numbers - share)
    groups = len(residuals)
    if groups < 2:
        return 0.0
    variance = groups / (groups - 1) * float((residuals**2).sum()) / n**2
    if not variance:
        return float(groups)
    # The variance itself is estimated, from few clusters badly.
    trust = (float(t.ppf(1 - ALPHA / 2, n - 1)) / float(t.ppf(1 - ALPHA / 2, groups - 1))) ** 2
    effective = share * (1 - share) / variance * trust
    return min(effective, n) if whole else effective


def mcnemar(before: Outcomes, after: Outcomes, clusters: Ints | None = None) -> tuple[float, float]:
    """Compare two 0/1 outcomes of the same records, each (n,).

    Args:
        before: of one run.
        after: of the other.
        clusters: (n,), see `rate`. The test is then over clusters: each one's difference might as well have had the
            other sign. With one record a cluster that is McNemar's test.

    Returns:
        The difference of the rates, after minus before, and the exact two-sided p.
    """
    from scipy.special import bdtr

    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    effect = (gained - lost) / len(before)
    if clusters is None:
        p = 1.0 if gained == lost else min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
        return effect, p
    _, places = np.unique(clusters, return_inverse=True)
    differences = np.bincount(places, after.astype(np.int64) - before.astype(np.int64)).astype(np.int64)
    return effect, _sign_flip(np.abs(differences[differences != 0]), abs(gained - lost))


def _sign_flip(sizes: Ints, observed: int) -> float:
    """Return the chance that a sum of `sizes` with random signs is as far from zero as `observed`."""
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)  # of each sum from -total to total
    chances[total] = 1.0
    for size in sizes.tolist():
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[np.abs(np.arange(-total, total + 1)) >= observed].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_difference(n: int, tests: int = 1, clusters: int | None = None) -> float | None:
    """Return the smallest difference of two rates on `n` paired records that McNemar's test can separate.

    That is the best case: no record changes the other way. With `tests` tests in Holm's family, the
    smallest that is separated even where all others are noise. None where `n` records separate nothing, or so
    few `clusters` of them: in the best case, one record changes in each.
    """
    for changed in range(1, (clusters or n) + 1):
        if 2 * 0.5**changed * tests < ALPHA:
            return changed / n
    return None


class Resamples:
    """Bootstrap samples of n records, the same for every run, so that differences stay paired."""

    def __init__(self, n: int, *, seed: int = SEED, size: int = RESAMPLES, clusters: Ints | None = None) -> None:
        """Draw `size` samples of `n` records with replacement, as counts; of whole clusters where there are some."""
        self._independent = clusters is None
        _, self._places = np.unique(np.arange(n) if clusters is None else clusters, return_inverse=True)
        drawn = int(self._places.max()) + 1
        counts = np.random.default_rng(seed).multinomial(drawn, np.full(drawn, 1 / drawn), size=size)
        self._weights = counts.astype(np.float32) / n

    def asr_max(self, hacked: Outcomes, made: Outcomes | None = None) -> Floats:
        """Return ASR(max) in each sample, (size,), of outcomes (n, attacks), as far as they were `made`; None: all."""
        rates = self._weights @ self._summed(hacked)
        if not self._independent or (made is not None and not made.all()):
            made = np.ones_like(hacked) if made is None else made
            with np.errstate(invalid="ignore"):
                rates = np.nan_to_num(rates / (self._weights @ self._summed(made)))
        maxima: Floats = rates.max(axis=1).astype(np.float64)
        return maxima

    def _summed(self, outcomes: Outcomes) -> NDArray[np.float32]:
        """Return outcomes (n, attacks) summed up within clusters, (clusters, attacks)."""
        columns = [np.bincount(self._places, column) for column in outcomes.T]
        return np.stack(columns, axis=1).astype(np.float32)


def percentiles(values: Floats) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % points of bootstrap values."""
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def asr_max(
    hacked: Outcomes,
    attacks: Sequence[str],
    resampled: Floats,
    made: Outcomes | None = None,
    clusters: Ints | None = None,
) -> Maximum:
    """Return the highest of the attacks' rates with a 95 % interval for the maximum.

    The bootstrap resamples records and takes the maximum anew in each sample. With fewer than `FEW` hits or
    misses of the worst attack it would hardly move (not at all at 0/n); the interval is then exact: the
    truth is at least every attack's rate, so its lower end is Clopper-Pearson's with Bonferroni's correction
    for the number of attacks; and at most the highest upper end over attacks, which needs no correction.
    Clusters are few, so with them it is made likewise of `rate`'s interval.

    Args:
        hacked: (n, attacks).
        attacks: their names.
        resampled: `Resamples.asr_max` of the same.
        made: (n, attacks), which of them were made; None: all.
        clusters: (n,), see `rate`.
    """
    tries = np.full(len(attacks), len(hacked)) if made is None else made.sum(axis=0)
    hits = hacked.sum(axis=0)
    worst = int((hits / tries).argmax())
    n, most = int(tries[worst]), int(hits[worst])
    bonferroni = ALPHA / 2 / len(attacks)
    if clusters is not None:
        own = np.ones(len(hacked), np.bool_) if made is None else made[:, worst]
        effective = _effective(hacked[own, worst].astype(np.float64), clusters[own], whole=True)
        share = most / n
        ends = clopper_pearson(share * effective, effective, lower_alpha=bonferroni) if effective else (0.0, 1.0)
        return Maximum(most, n, share, *ends, attack=attacks[worst], interval="clustered")
    few = min(most, n - most) < FEW
    interval = clopper_pearson(most, n, lower_alpha=bonferroni) if few else percentiles(resampled)
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
        if isinstance(point, Maximum) and point.interval in ("exact", "clustered"):
            for end in point.ends:
                moved = float(ratio(*centre[:index], end, *centre[index + 1 :]))
                ends = [min(ends[0], moved), max(ends[1], moved)]
    return ends[0], ends[1]
