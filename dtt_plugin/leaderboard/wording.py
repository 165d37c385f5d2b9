"""How figures are written: the same words in tables, on the page and in charts."""

from __future__ import annotations

from dtt_plugin.leaderboard import statistics
from dtt_plugin.leaderboard.board import Cost, GapClosed, Ratio, Test
from dtt_plugin.leaderboard.statistics import Rate

WEAK_NATIVE = "†"
NOISE = "n.s."
UNDEFINED = "undefined"
NONE = "-"


def percent(share: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def rate_text(rate: Rate | None) -> str:
    """Return for instance `0/208 = 0.0 % [0.0, 1.8]`; a published figure has neither counts nor interval."""
    if rate is None:
        return NONE
    counts = f"{rate.hits}/{rate.n} = " if rate.hits is not None else ""
    return f"{counts}{percent(rate.rate)} %{interval_text(rate)}"


def interval_text(rate: Rate) -> str:
    """Return a rate's interval in percent, with a blank in front; "" where it has none."""
    return f" [{percent(rate.ends[0])}, {percent(rate.ends[1])}]" if rate.low is not None else ""


def p_text(p: float) -> str:
    """Return a p value."""
    return "p<0.0001" if p < 0.0001 else f"p={p:.4f}"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f} pp"


def test_text(test: Test | None) -> str:
    """Return a test's difference and its adjusted p."""
    if test is None:
        return NONE
    return f"{points(test.effect)}, {p_text(test.p_holm)}" + ("" if test.told_from_noise else f" {NOISE}")


def weak_mark(ratio: Ratio) -> str:
    """Return the mark of a gap-closed ratio whose native tokens are worse than a row of the table; "" for another."""
    return WEAK_NATIVE if ratio.weak_native else ""


def ratio_text(gap: GapClosed | None, kind: str) -> str:
    """Return a row's gap-closed ratio, measured or published; `-` where there is nothing to close it against."""
    if gap is None or kind not in gap.ratios:
        return NONE
    ratio = gap.ratios[kind]
    return UNDEFINED if ratio is None else value_text(ratio)


def value_text(ratio: Ratio) -> str:
    """Return a defined ratio with its interval and mark."""
    interval = f" [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio.low is not None else ""
    return f"{ratio.value:.3f}{interval}{weak_mark(ratio)}"


def cost_text(cost: Cost, name: str) -> str:
    """Return one of a row's costs, with its unit."""
    value: float | None = getattr(cost, name)
    if value is None:
        return NONE
    if name == "peak_memory_mb":
        return f"{value:.0f} MB"
    if name == "speedup":
        return f"{value:.1f} x"
    return f"{value:.1f} s" if value >= 1 else f"{value:.3g} s"


def method_in_words(floor: float, seed: int) -> dict[str, str | float]:
    """Return how the figures are made, in words."""
    return {
        "confidence": 1 - statistics.ALPHA,
        "rates": "Clopper-Pearson",
        "asr_max": f"percentile bootstrap over records, {statistics.RESAMPLES} samples, seed {seed}; exact"
        f" with fewer than {statistics.FEW} hits or misses",
        "tests": "exact McNemar on whether any attack worked on a record; Holm over all tests of a table",
        "speed-up": "what training the model's own tokens costs (as the native row's token file tells, or 16"
        " GPU-hours where that is published for the model) over what making the row's tokens cost; only where the"
        " row is told apart from undefended",
        "floor": floor,
    }
