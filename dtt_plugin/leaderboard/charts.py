"""The report's charts of rates and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from dtt_plugin.leaderboard.board import Bound, Group, Suite
from dtt_plugin.leaderboard.sheets import arm_name, bound_name
from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.leaderboard.svg import BAR, BOTTOM, LABEL, LEFT, RIGHT, Axis, drawing, element, grid, line, marker, text
from dtt_plugin.leaderboard.wording import rate_text, value_text
from dtt_plugin.tasks.attacks import ADAPTIVE

# Of a chart that can still be read on a telephone.
_NARROW = 640
_LONGEST_NAME = 44


def headline(group: Group) -> Markup:
    """Return one bar with its interval per row: the headline ASR, the name and the figures above it."""
    axis, edge = Axis(0, 1, 0, _NARROW), _NARROW
    parts: list[Markup] = []
    y = 2.0
    for row in group.rows:
        rate = row.headline
        if rate is None:
            continue
        name = arm_name(row, group)
        parts.append(text(0, y + 14, name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…", "name"))
        parts.append(text(edge, y + 14, rate_text(rate), "small", "end"))
        y += LABEL
        parts += _bar(axis, rate, y, 0 if not row.published else 5, BAR)
        y += BAR + 6
    lines = [line(axis(step / 5), 0, axis(step / 5), y, "grid") for step in range(6)]
    anchors = ("start", "middle", "middle", "middle", "middle", "end")
    ticks = [text(axis(n / 5), y + 16, f"{20 * n} %", "small", anchor) for n, anchor in enumerate(anchors)]
    title = f"{'Worst' if group.is_adaptive else 'Highest'} attack success rate of each row, with 95 % intervals"
    return drawing(y + BOTTOM, title, *lines, *ticks, *parts, width=_NARROW)


def cell_bar(rate: Rate) -> Markup:
    """Return a rate and its interval as a small bar for a table's cell."""
    return element(
        "svg",
        *_bar(Axis(0, 1, 0, 120), rate, 0, 0, 12),
        viewBox="0 0 120 12",
        width=120,
        height=12,
        class_="bar",
        aria_hidden="true",
    )


def _bar(axis: Axis, rate: Rate, y: float, series: int, height: float) -> list[Markup]:
    """Return a bar from the axis' start to a rate, with its interval."""
    middle = y + height / 2
    box = {"x": axis.start, "y": y + 1, "width": max(axis(rate.rate) - axis.start, 1.0), "height": height - 2}
    parts = [element("rect", class_=f"fill{series}", **box)]
    if rate.low is not None:
        low, high = map(axis, rate.ends)
        parts.append(line(low, middle, high, middle, "whisker"))
        parts += [line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high)]
    return parts


class Trade(NamedTuple):
    """What a defense gives, and what it costs in use."""

    title: str
    asr: str
    """What the ASR is of."""
    measure: str
    points: Sequence[tuple[str, Rate, Rate]]
    """Per arm its name, headline ASR and share of right answers."""


def trade_of(group: Group) -> Trade | None:
    """Return what a table tells of use; None where no answer is scored."""
    for measure in ("utility", "answered", "answered_under_attack", "processed", "control"):
        rows = [row for row in group.rows if measure in row.measures]
        points = [(arm_name(row, group), row.headline, row.measures[measure]) for row in rows]
        known = [(name, asr, answered) for name, asr, answered in points if asr]
        if known:
            return Trade(group.title, "attack success rate", measure.replace("_", " "), known)
    return None


def trade_of_suite(suite: Suite) -> Trade | None:
    """Return utility against the ASR of the benchmark with the most records; None where no utility was measured."""
    measure = next((name for name in suite.measures if name.startswith("utility")), None)
    sizes = [(cell.rate.n, task) for row in suite.rows for task, cell in row.benchmarks.items()]
    if measure is None or not sizes:
        return None
    _, task = max(sizes, key=lambda pair: pair[0])
    both = [row for row in suite.rows if task in row.benchmarks and measure in row.measures]
    points = [(row.arm, row.benchmarks[task].rate, row.measures[measure].rate) for row in both]
    return Trade(suite.title, f"attack success rate, {task}", measure, points) if points else None


def tradeoff(trade: Trade | None) -> Markup | None:
    """Return ASR against right answers, one point an arm, intervals on both axes."""
    if trade is None:
        return None
    _, attacked, measure, points = trade
    across, up = Axis(0, 1, 60, 480), Axis(0, 1, 320, 16)
    parts: list[Markup] = []
    for step in range(6):
        share = step / 5
        parts.append(line(across(share), 16, across(share), 320, "grid"))
        parts.append(line(60, up(share), 480, up(share), "grid"))
        parts.append(text(across(share), 338, f"{20 * step} %", "small", "middle"))
        parts.append(text(54, up(share) + 4, f"{20 * step} %", "small", "end"))
    for number, (name, asr, answered) in enumerate(points):
        x, y = across(answered.rate), up(asr.rate)
        parts.append(line(across(answered.ends[0]), y, across(answered.ends[1]), y, "whisker"))
        parts.append(line(x, up(asr.ends[0]), x, up(asr.ends[1]), "whisker"))
        parts.append(marker(number, x, y))
        parts.append(marker(number, 510, 24 + 22 * number))
        parts.append(text(522, 28 + 22 * number, name[:40], "small"))
    parts.append(text(270, 356, f"{measure}, share of responses", "small", "middle"))
    across_text = {"transform": "translate(14 168) rotate(-90)", "text_anchor": "middle", "class_": "small"}
    parts.append(element("text", attacked, **across_text))
    return drawing(max(364, 40 + 22 * len(points)), f"Attack success against {measure}", *parts, width=820)


class Steps(NamedTuple):
    """A picture of hits against the optimiser's steps."""

    title: str
    across: str
    """What a step is, and whose hits these are."""
    curves: Sequence[tuple[str, tuple[tuple[int, float], ...], Rate | None]]
    """Per arm its name, how its share of hit records grew, and the rate that lm-eval confirms at the end."""


def steps_of(group: Group) -> Steps | None:
    """Return how far the attacks of a table came step by step, on the arms that they were made on."""
    curves = [(arm_name(row, group), row.optimiser, row.asr[ADAPTIVE]) for row in group.rows if row.optimiser]
    attack = next((row.attack for row in group.rows if row.optimiser), "")
    what = f"step of {attack}; line: hits in the optimiser, marker: ASR by lm-eval with its 95 % interval"
    return Steps(f"{group.title} · ASR against steps", what, curves) if curves else None


def steps_of_bounds(bounds: Sequence[Bound]) -> Steps | None:
    """Return how far soft attacks came step by step."""
    alike = {(bound.model, bound.task) for bound in bounds}
    names = [bound.arm if len(alike) == 1 else bound_name(bound) for bound in bounds]
    curves = [(f"{name} · {bound.attack}", bound.curve, None) for name, bound in zip(names, bounds, strict=True)]
    title = " · ".join(["Soft attacks", *(alike.pop() if len(alike) == 1 else ())])
    what = "step of Adam; records hit by vectors in the optimiser, an upper bound and no ASR"
    return Steps(title, what, curves) if curves else None


def against_steps(steps: Steps | None) -> Markup | None:
    """Return the picture of `steps_of`: a line for each arm, and at its end what lm-eval confirms."""
    if steps is None:
        return None
    right = 480
    across = Axis(0, max(curve[-1][0] for _, curve, _ in steps.curves), 60, right)
    up = Axis(0, 1, 320, 16)
    parts: list[Markup] = []
    for fifth in range(6):
        share = fifth / 5
        parts.append(line(60, up(share), right, up(share), "grid"))
        parts.append(text(54, up(share) + 4, f"{20 * fifth} %", "small", "end"))
    for quarter in range(5):
        step = quarter / 4 * across.high
        parts.append(text(across(step), 338, f"{step:g}", "small", "middle"))
    for number, (name, curve, confirmed) in enumerate(steps.curves):
        corners = [f"{across(curve[0][0]):.1f},{up(curve[0][1]):.1f}"]
        for (_, before), (step, share) in pairwise(curve):
            corners += [f"{across(step):.1f},{up(before):.1f}", f"{across(step):.1f},{up(share):.1f}"]
        parts.append(element("polyline", points=" ".join(corners), class_=f"curve line{number % 6}"))
        if confirmed:
            x = right + 12 + 14 * (number % 6)
            parts.append(line(x, up(confirmed.ends[0]), x, up(confirmed.ends[1]), "whisker"))
            parts.append(marker(number, x, up(confirmed.rate)))
        y = 24 + 22 * number
        parts.append(line(590, y, 614, y, f"curve line{number % 6}"))
        parts += [marker(number, 602, y)] if confirmed else []
        parts.append(text(622, y + 4, name[:_LONGEST_NAME], "small"))
    parts.append(text(60, 356, steps.across, "small"))
    return drawing(max(364, 40 + 22 * len(steps.curves)), steps.title, *parts)


def asr_bars(group: Group, attacks: Sequence[str]) -> Markup:
    """Return one bar with its interval per run and attack; each attack has a colour, a hatch and its name."""
    axis = Axis(0, 1, LEFT, RIGHT)
    parts: list[Markup] = []
    y = 4.0
    for row in group.rows:
        rates = [(attack, row.asr[attack]) for attack in attacks if attack in row.asr]
        if not rates:
            continue
        parts.append(text(0, y + 14, arm_name(row, group), "name"))
        y += LABEL
        for attack, rate in rates:
            series = attacks.index(attack) % 6
            parts.append(text(LEFT - 6, y + 11, attack, "small", "end"))
            parts += _bar(axis, rate, y, series, BAR)
            width = max(axis(rate.rate) - LEFT, 1.0)
            parts.append(element("rect", fill=f"url(#hatch{series})", x=LEFT, y=y + 1, width=width, height=BAR - 2))
            parts.append(text(RIGHT + 12, y + 11, rate_text(rate), "small"))
            y += BAR
        y += 4
    lines = grid(axis, y, [step / 5 for step in range(6)], percent_ticks=True)
    return drawing(y + BOTTOM, "Attack success rate per attack, with 95 % intervals", *lines, *parts)


def gap_closed(group: Group) -> Markup | None:
    """Return the gap-closed ratios: a disc against the measured native row, a diamond against the published one."""
    rows = [(arm_name(row, group), row.ratios) for row in group.rows if row.ratios]
    if not rows:
        return None
    # An interval can be as wide as its denominator is uncertain; past these bounds the figures beside it tell.
    ratios = [ratio for _, of_row in rows for ratio in of_row.values()]
    ends = [end for ratio in ratios for end in (ratio.value, ratio.low, ratio.high) if end is not None]
    # Whole quarters, so that the first and the last line stand where their figures say.
    low, high = math.floor(4 * max(min(0, *ends), -1)), math.ceil(4 * min(max(1, *ends), 2))
    axis = Axis(low / 4, high / 4, LEFT, RIGHT)
    parts: list[Markup] = []
    y = 4.0
    for run, of_row in rows:
        parts.append(text(0, y + 14, run, "name"))
        y += LABEL
        for kind, ratio in of_row.items():
            middle, x = y + BAR / 2, axis(ratio.value)
            parts.append(text(LEFT - 6, y + 11, kind, "small", "end"))
            if ratio.low is not None and ratio.high is not None:
                parts.append(line(axis(ratio.low), middle, axis(ratio.high), middle, "whisker"))
            parts.append(marker(0 if kind == "measured" else 1, x, middle))
            parts.append(text(RIGHT + 12, y + 11, value_text(ratio), "small"))
            y += BAR
        y += 4
    lines = grid(axis, y, [step / 4 for step in range(low, high + 1)])
    ends_of_gap = [line(axis(tick), 0, axis(tick), y, "strong") for tick in (0, 1)]
    title = "Gap closed: 0 is the undefended model, 1 the native tokens"
    return drawing(y + BOTTOM, title, *lines, *ends_of_gap, *parts)
