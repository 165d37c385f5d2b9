"""The report's charts as inline SVG. Colours come from the page's style sheet, texts are escaped by markupsafe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

from dtt_plugin.leaderboard.board import Bound, Group, Suite
from dtt_plugin.leaderboard.curves import Curve
from dtt_plugin.leaderboard.statistics import Rate
from dtt_plugin.leaderboard.tables import arm_name, bound_name
from dtt_plugin.leaderboard.wording import percent, rate_text, value_text
from dtt_plugin.tasks.attacks import ADAPTIVE
from dtt_plugin.tokens.geometry import Geometry, letter

WIDTH = 900
_BAR = 14
_LABEL = 20
# The plot's left and right edge; to the right of it stand the figures.
_LEFT, _RIGHT = 140, 640
_BOTTOM = 24
# Of a chart that can still be read on a telephone.
_NARROW = 640
_LONGEST_NAME = 44


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """Return one SVG element; `_` in an attribute's name stands for `-`, `class_` for `class`."""
    names = (("class" if name == "class_" else name.replace("_", "-"), value) for name, value in attributes.items())
    written = Markup("").join(Markup(' {}="{}"').format(name, _plain(value)) for name, value in names)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(map(escape, children)))


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _svg(height: float, title: str, *children: str, width: float = WIDTH) -> Markup:
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {width} {height:.0f}",
        width=width,
        role="img",
        class_="chart",
    )


def _text(x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> Markup:
    return element("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


class _Axis:
    """A linear scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self.start, self.stop = low, high if high > low else low + 1, start, stop

    def __call__(self, value: float) -> float:
        clipped = min(max(value, self.low), self.high)
        return self.start + (clipped - self.low) / (self.high - self.low) * (self.stop - self.start)


def headline(group: Group) -> Markup:
    """Return one bar with its interval per row: the headline ASR, the name and the figures above it."""
    axis, edge = _Axis(0, 1, 0, _NARROW), _NARROW
    parts: list[Markup] = []
    y = 2.0
    for row in group.rows:
        rate = row.headline
        if rate is None:
            continue
        name = arm_name(row, group)
        parts.append(_text(0, y + 14, name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…", "name"))
        parts.append(_text(edge, y + 14, rate_text(rate), "small", "end"))
        y += _LABEL
        parts += _bar(axis, rate, y, 0 if not row.published else 5, _BAR)
        y += _BAR + 6
    grid = [_line(axis(step / 5), 0, axis(step / 5), y, "grid") for step in range(6)]
    anchors = ("start", "middle", "middle", "middle", "middle", "end")
    ticks = [_text(axis(n / 5), y + 16, f"{20 * n} %", "small", anchor) for n, anchor in enumerate(anchors)]
    title = f"{'Worst' if group.is_adaptive else 'Highest'} attack success rate of each row, with 95 % intervals"
    return _svg(y + _BOTTOM, title, *grid, *ticks, *parts, width=_NARROW)


def cell_bar(rate: Rate) -> Markup:
    """Return a rate and its interval as a small bar for a table's cell."""
    return element(
        "svg",
        *_bar(_Axis(0, 1, 0, 120), rate, 0, 0, 12),
        viewBox="0 0 120 12",
        width=120,
        height=12,
        class_="bar",
        aria_hidden="true",
    )


def _bar(axis: _Axis, rate: Rate, y: float, series: int, height: float) -> list[Markup]:
    """Return a bar from the axis' start to a rate, with its interval."""
    middle = y + height / 2
    box = {"x": axis.start, "y": y + 1, "width": max(axis(rate.rate) - axis.start, 1.0), "height": height - 2}
    parts = [element("rect", class_=f"fill{series}", **box)]
    if rate.low is not None:
        low, high = map(axis, rate.ends)
        parts.append(_line(low, middle, high, middle, "whisker"))
        parts += [_line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high)]
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
    across, up = _Axis(0, 1, 60, 480), _Axis(0, 1, 320, 16)
    parts: list[Markup] = []
    for step in range(6):
        share = step / 5
        parts.append(_line(across(share), 16, across(share), 320, "grid"))
        parts.append(_line(60, up(share), 480, up(share), "grid"))
        parts.append(_text(across(share), 338, f"{20 * step} %", "small", "middle"))
        parts.append(_text(54, up(share) + 4, f"{20 * step} %", "small", "end"))
    for number, (name, asr, answered) in enumerate(points):
        x, y = across(answered.rate), up(asr.rate)
        parts.append(_line(across(answered.ends[0]), y, across(answered.ends[1]), y, "whisker"))
        parts.append(_line(x, up(asr.ends[0]), x, up(asr.ends[1]), "whisker"))
        parts.append(_marker(number, x, y))
        parts.append(_marker(number, 510, 24 + 22 * number))
        parts.append(_text(522, 28 + 22 * number, name[:40], "small"))
    parts.append(_text(270, 356, f"{measure}, share of responses", "small", "middle"))
    across_text = {"transform": "translate(14 168) rotate(-90)", "text_anchor": "middle", "class_": "small"}
    parts.append(element("text", attacked, **across_text))
    return _svg(max(364, 40 + 22 * len(points)), f"Attack success against {measure}", *parts, width=820)


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
    across = _Axis(0, max(curve[-1][0] for _, curve, _ in steps.curves), 60, right)
    up = _Axis(0, 1, 320, 16)
    parts: list[Markup] = []
    for fifth in range(6):
        share = fifth / 5
        parts.append(_line(60, up(share), right, up(share), "grid"))
        parts.append(_text(54, up(share) + 4, f"{20 * fifth} %", "small", "end"))
    for quarter in range(5):
        step = quarter / 4 * across.high
        parts.append(_text(across(step), 338, f"{step:g}", "small", "middle"))
    for number, (name, curve, confirmed) in enumerate(steps.curves):
        corners = [f"{across(curve[0][0]):.1f},{up(curve[0][1]):.1f}"]
        for (_, before), (step, share) in pairwise(curve):
            corners += [f"{across(step):.1f},{up(before):.1f}", f"{across(step):.1f},{up(share):.1f}"]
        parts.append(element("polyline", points=" ".join(corners), class_=f"curve line{number % 6}"))
        if confirmed:
            x = right + 12 + 14 * (number % 6)
            parts.append(_line(x, up(confirmed.ends[0]), x, up(confirmed.ends[1]), "whisker"))
            parts.append(_marker(number, x, up(confirmed.rate)))
        y = 24 + 22 * number
        parts.append(_line(590, y, 614, y, f"curve line{number % 6}"))
        parts += [_marker(number, 602, y)] if confirmed else []
        parts.append(_text(622, y + 4, name[:_LONGEST_NAME], "small"))
    parts.append(_text(60, 356, steps.across, "small"))
    return _svg(max(364, 40 + 22 * len(steps.curves)), steps.title, *parts)


def asr_bars(group: Group, attacks: Sequence[str]) -> Markup:
    """Return one bar with its interval per run and attack; each attack has a colour, a hatch and its name."""
    axis = _Axis(0, 1, _LEFT, _RIGHT)
    parts: list[Markup] = []
    y = 4.0
    for row in group.rows:
        rates = [(attack, row.asr[attack]) for attack in attacks if attack in row.asr]
        if not rates:
            continue
        parts.append(_text(0, y + 14, arm_name(row, group), "name"))
        y += _LABEL
        for attack, rate in rates:
            series = attacks.index(attack) % 6
            parts.append(_text(_LEFT - 6, y + 11, attack, "small", "end"))
            parts += _bar(axis, rate, y, series, _BAR)
            width = max(axis(rate.rate) - _LEFT, 1.0)
            parts.append(element("rect", fill=f"url(#hatch{series})", x=_LEFT, y=y + 1, width=width, height=_BAR - 2))
            parts.append(_text(_RIGHT + 12, y + 11, rate_text(rate), "small"))
            y += _BAR
        y += 4
    grid = _grid(axis, y, [step / 5 for step in range(6)], percent_ticks=True)
    return _svg(y + _BOTTOM, "Attack success rate per attack, with 95 % intervals", *grid, *parts)


def _grid(axis: _Axis, bottom: float, ticks: Sequence[float], *, percent_ticks: bool = False) -> list[Markup]:
    parts = []
    for tick in ticks:
        parts.append(_line(axis(tick), 0, axis(tick), bottom, "grid"))
        label = f"{100 * tick:.0f} %" if percent_ticks else f"{tick:g}"
        parts.append(_text(axis(tick), bottom + 16, label, "small", "middle"))
    return parts


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
    axis = _Axis(low / 4, high / 4, _LEFT, _RIGHT)
    parts: list[Markup] = []
    y = 4.0
    for run, of_row in rows:
        parts.append(_text(0, y + 14, run, "name"))
        y += _LABEL
        for kind, ratio in of_row.items():
            middle, x = y + _BAR / 2, axis(ratio.value)
            parts.append(_text(_LEFT - 6, y + 11, kind, "small", "end"))
            if ratio.low is not None and ratio.high is not None:
                parts.append(_line(axis(ratio.low), middle, axis(ratio.high), middle, "whisker"))
            parts.append(_marker(0 if kind == "measured" else 1, x, middle))
            parts.append(_text(_RIGHT + 12, y + 11, value_text(ratio), "small"))
            y += _BAR
        y += 4
    grid = _grid(axis, y, [step / 4 for step in range(low, high + 1)])
    ends_of_gap = [_line(axis(tick), 0, axis(tick), y, "strong") for tick in (0, 1)]
    title = "Gap closed: 0 is the undefended model, 1 the native tokens"
    return _svg(y + _BOTTOM, title, *grid, *ends_of_gap, *parts)


def _marker(series: int, x: float, y: float) -> Markup:
    """Return the series' marker: disc, diamond, square, triangle, cross, ring."""
    style = f"fill{series % 6} mark"
    match series % 6:
        case 0:
            return element("circle", cx=x, cy=y, r=5, class_=style)
        case 1:
            return element("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z", class_=style)
        case 2:
            return element("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_=style)
        case 3:
            return element("path", d=f"M{x:.1f} {y - 6:.1f}l6 10h-12z", class_=style)
        case 4:
            return element("path", d=f"M{x - 5:.1f} {y - 2:.1f}h3v-3h4v3h3v4h-3v3h-4v-3h-3z", class_=style)
        case _:
            return element("circle", cx=x, cy=y, r=4, class_=f"ring line{series % 6}")


def norms(geometry: Geometry) -> Markup:
    """Return the tokens' norms, and the band that holds 98 % of the vocabulary's where it is known, on a log axis."""
    import numpy as np

    values = [*geometry.norms.tolist(), *(geometry.vocabulary or ())]
    positive = [value for value in values if value > 0] or [1.0]
    low, high = 10 ** np.floor(np.log10(min(positive))), 10 ** np.ceil(np.log10(max(positive)))
    axis = _Axis(float(np.log10(low)), float(np.log10(high)), _LEFT, _RIGHT)

    def x(value: float) -> float:
        return axis(float(np.log10(max(value, low))))

    parts: list[Markup] = []
    y = 4.0
    if geometry.vocabulary:
        left, middle, right = (x(value) for value in geometry.vocabulary)
        parts.append(_text(_LEFT - 6, y + 11, "vocabulary", "small", "end"))
        parts.append(element("rect", x=left, y=y, width=max(right - left, 2.0), height=_BAR, class_="band"))
        parts.append(_line(middle, y, middle, y + _BAR, "strong"))
        shown = " / ".join(f"{value:.3g}" for value in geometry.vocabulary)
        parts.append(_text(_RIGHT + 12, y + 11, f"1 / 50 / 99 %: {shown}", "small"))
        y += _BAR + 4
    for source, name in enumerate(geometry.sources):
        parts.append(_text(0, y + 14, f"{letter(source)}: {name}", "name"))
        y += _LABEL
        own = geometry.norms[geometry.source_of == source].tolist()
        parts += [_marker(source, x(value), y + _BAR / 2) for value in own]
        parts.append(_text(_RIGHT + 12, y + 11, f"{min(own):.4g} to {max(own):.4g}", "small"))
        y += _BAR + 4
    ticks = range(round(axis.low), round(axis.high) + 1)
    grid = []
    for tick in ticks:
        grid.append(_line(axis(tick), 0, axis(tick), y, "grid"))
        grid.append(_text(axis(tick), y + 16, f"{10.0**tick:g}", "small", "middle"))
    return _svg(y + _BOTTOM, "Norms of the DefensiveTokens", *grid, *parts)


def cosines(geometry: Geometry) -> Markup:
    """Return the heat map of the cosines between tokens, each cell with its figure."""
    names, count = geometry.names, len(geometry.names)
    size = 44 if count <= 20 else 30
    edge = 40
    parts = []
    for row, name in enumerate(names):
        parts.append(_text(edge - 4, edge + row * size + size / 2 + 4, name, "small", "end"))
        parts.append(_text(edge + row * size + size / 2, edge - 6, name, "small", "middle"))
        for column in range(count):
            value = float(geometry.cosine[row, column])
            x, y = edge + column * size, edge + row * size
            colour = "warm" if value >= 0 else "cold"
            parts.append(
                element(
                    "rect", x=x, y=y, width=size - 1, height=size - 1, class_=colour, fill_opacity=0.75 * abs(value)
                )
            )
            figure = f"{value:.2f}".replace("0.", ".")
            parts.append(_text(x + size / 2, y + size / 2 + 4, figure, "small", "middle"))
    extent = edge + count * size
    return _svg(extent, "Cosines between the DefensiveTokens", *parts, width=max(extent, 300))


def plane(geometry: Geometry) -> Markup:
    """Return the tokens in the plane of their two main components."""
    width, height, edge = 560, 400, 40
    low, high = geometry.plane.min(axis=0), geometry.plane.max(axis=0)
    across = _Axis(float(low[0]), float(high[0]), edge + 20, width - edge)
    up = _Axis(float(low[1]), float(high[1]), height - edge - 20, 20)
    frame = element("rect", x=edge, y=4, width=width - edge - 4, height=height - edge - 4, class_="frame")
    parts = []
    for (x, y), source, name in zip(geometry.plane.tolist(), geometry.source_of.tolist(), geometry.names, strict=True):
        parts.append(_marker(source, across(x), up(y)))
        parts.append(_text(across(x) + 9, up(y) + 4, name, "small"))
    first, second = geometry.explained
    labels = [
        _text(width / 2, height - 14, f"first component, {percent(first)} % of the variance", "small", "middle"),
        element(
            "text",
            f"second component, {percent(second)} %",
            transform=f"translate(18 {height / 2}) rotate(-90)",
            text_anchor="middle",
            class_="small",
        ),
    ]
    return _svg(height, "Main plane of the DefensiveTokens", frame, *parts, *labels, width=width)


def learning_curves(curves: Sequence[Curve], kind: str) -> Markup | None:
    """Return the curves of `kind`, "loss" or "asr"; each has a colour, a marker and a letter."""
    shown = [(number, getattr(curve, kind)) for number, curve in enumerate(curves) if getattr(curve, kind)]
    if not shown:
        return None
    height, bottom, right = 300, 260, WIDTH - 110
    points = [point for _, own in shown for point in own]
    top = 1.0 if kind == "asr" else max(y for _, y in points)
    across = _Axis(0, max(x for x, _ in points), 60, right)
    up = _Axis(min(0.0, *(y for _, y in points)), top, bottom, 10)
    parts = []
    for quarter in range(5):
        value = up.low + quarter / 4 * (up.high - up.low)
        parts.append(_line(60, up(value), right, up(value), "grid"))
        label = f"{100 * value:.0f} %" if kind == "asr" else f"{value:.3g}"
        parts.append(_text(54, up(value) + 4, label, "small", "end"))
        step = quarter / 4 * across.high
        parts.append(_text(across(step), bottom + 18, f"{step:.0f}", "small", "middle"))
    for number, own in shown:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in own)
        parts.append(element("polyline", points=path, class_=f"curve line{number % 6}"))
        if kind == "asr":
            parts += [_marker(number, across(x), up(y)) for x, y in own]
        x, y = own[-1]
        parts.append(_text(across(x) + 9 + 14 * (number % 6), up(y) + 4, letter(number), "small"))
    parts.append(_text((60 + right) / 2, height - 4, "step", "small", "middle"))
    title = "Attack success rate while training" if kind == "asr" else "Training loss"
    return _svg(height, title, *parts)
