"""Every statistic recomputed by another route: statsmodels, SciPy, brute force or by hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtt_plugin.leaderboard import statistics

multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
proportion_confint = pytest.importorskip("statsmodels.stats.proportion").proportion_confint
sm_mcnemar = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """statsmodels collects garbage in each call: a second, where other tests of the process have loaded models."""
    gc.freeze()
    yield
    gc.unfreeze()


def draw(n: int, *shares: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, len(shares))) < shares


def test_zero_of_208_is_at_most_1_8_percent() -> None:
    zero = statistics.rate(np.zeros(208, np.bool_))
    assert (zero.hits, zero.n, zero.rate, zero.low) == (0, 208, 0.0, 0.0)
    assert zero.ends[1] == pytest.approx(1 - 0.025 ** (1 / 208))  # by hand: (1 - p)^208 = 2.5 %
    assert f"{100 * zero.ends[1]:.1f}" == "1.8"


@given(st.integers(1, 300), st.data())
@settings(max_examples=100, deadline=None)
def test_intervals_are_those_of_statsmodels(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    expected = proportion_confint(hits, n, method="beta")
    assert statistics.clopper_pearson(hits, n) == pytest.approx(np.nan_to_num(expected, nan=0.0), abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_mcnemar_is_that_of_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (np.array(column) for column in zip(*pairs, strict=True))
    table = [[int(((before == x) & (after == y)).sum()) for y in (True, False)] for x in (True, False)]
    effect, p = statistics.mcnemar(before, after)
    assert p == pytest.approx(sm_mcnemar(table, exact=True).pvalue)
    assert effect == pytest.approx(after.mean() - before.mean())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    assert statistics.holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_the_smallest_difference_is_the_first_that_mcnemar_separates() -> None:
    for n in (5, 6, 48, 208):
        separated = [
            k / n
            for k in range(1, n + 1)
            if statistics.mcnemar(np.arange(n) < k, np.zeros(n, np.bool_))[1] < statistics.ALPHA
        ]
        assert statistics.smallest_difference(n) == (separated[0] if separated else None)
    assert statistics.smallest_difference(208) == 6 / 208
    assert statistics.smallest_difference(208, tests=5) == 8 / 208  # 5 * 2 / 2^8 < 5 %


def test_the_bootstrap_of_the_maximum_is_that_of_scipy() -> None:
    from scipy.stats import bootstrap

    hacked = draw(208, 0.5, 0.45, 0.48)
    resampled = statistics.Resamples(208, seed=1).asr_max(hacked)
    ours = statistics.asr_max(hacked, ["a", "b", "c"], resampled)
    theirs = bootstrap(
        tuple(hacked.T.astype(float)),
        lambda a, b, c, axis: np.maximum(np.maximum(a.mean(axis), b.mean(axis)), c.mean(axis)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=2,
    ).confidence_interval
    assert ours.interval == "bootstrap"
    assert ours.rate == hacked.mean(axis=0).max()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_the_bootstrap_counts_every_resample_of_three_records() -> None:
    hacked = np.array([[1, 0], [0, 1], [0, 0]], np.bool_)
    exact = [hacked[list(chosen)].mean(axis=0).max() for chosen in product(range(3), repeat=3)]
    resampled = statistics.Resamples(3, seed=0, size=200_000).asr_max(hacked)
    for value in sorted(set(exact)):
        assert np.isclose(resampled, value).mean() == pytest.approx(np.isclose(exact, value).mean(), abs=0.005)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    hacked = draw(100, 0.4, 0.3)
    first, again, other = (statistics.Resamples(100, seed=seed).asr_max(hacked) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("true", [(0.0, 0.0, 0.0), (0.01, 0.01, 0.01), (0.04, 0.01, 0.0)])
def test_rare_hits_get_an_interval_that_holds_the_true_maximum(true: tuple[float, ...]) -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        hacked = generator.random((208, 3)) < true
        worst = statistics.asr_max(hacked, "abc", np.zeros(1))
        assert worst.interval == "exact" or (worst.hits or 0) >= statistics.FEW
        held += worst.interval != "exact" or worst.ends[0] <= max(true) <= worst.ends[1]
    assert held / 400 >= 0.95


def test_the_ratio_interval_is_the_bootstraps_and_never_certain_at_zero() -> None:
    none, own, native = draw(208, 0.5, seed=1), draw(208, 0.2, seed=2), draw(208, 0.08, seed=3)
    resamples = statistics.Resamples(208, seed=4)
    values = [resamples.asr_max(hacked) for hacked in (none, own, native)]
    points = [statistics.asr_max(hacked, ["a"], v) for hacked, v in zip((none, own, native), values, strict=True)]

    def ratio(n: object, x: object, t: object) -> object:
        return (n - x) / (n - t)  # type: ignore[operator]

    generator = np.random.default_rng(9)
    brute = []
    for _ in range(4000):
        chosen = generator.integers(0, 208, 208)
        brute.append((none[chosen].mean() - own[chosen].mean()) / (none[chosen].mean() - native[chosen].mean()))
    interval = statistics.ratio_interval(ratio, points, values)
    assert interval == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.02)

    zero = np.zeros((208, 1), np.bool_)
    still = resamples.asr_max(zero)
    exact = statistics.asr_max(zero, ["a"], still)
    interval = statistics.ratio_interval(ratio, [points[0], exact, exact], [values[0], still, still])
    assert interval is not None
    assert interval[0] == pytest.approx((points[0].rate - exact.ends[1]) / points[0].rate)
    assert interval[1] > 1
    assert statistics.ratio_interval(ratio, [exact] * 3, [still] * 3) is None


def test_one_sample_without_a_gap_does_not_take_the_ratios_interval_away() -> None:
    gap = np.linspace(0, 0.4, 10_000)
    point = statistics.Rate(None, 100, 0.2, None, None)
    for own in (np.zeros(10_000), 0.1 * gap):  # the ratio of the first sample is infinite, then 0 / 0
        interval = statistics.ratio_interval(lambda n, x, t: (0.5 - x) / n, [point] * 3, [gap, own, 0.0])
        assert interval is not None
        assert interval[0] == pytest.approx(np.quantile((0.5 - own[1:]) / gap[1:], 0.025), rel=0.01)
