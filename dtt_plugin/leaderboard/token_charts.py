"""The report's charts of tokens: their lengths, angles, plane, and how they were trained."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dtt_plugin.leaderboard.curves import Curve
from dtt_plugin.leaderboard.svg import (
    BAR,
    BOTTOM,
    LABEL,
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    drawing,
    element,
    line,
    marker,
    text,
)
from dtt_plugin.leaderboard.wording import percent
from dtt_plugin.tokens.geometry import Geometry, letter


def norms(geometry: Geometry) -> Markup:
    """Return the tokens' norms, and the band that holds 98 % of the vocabulary's where it is known, on a log axis."""
    import numpy as np

    values = [*geometry.norms.tolist(), *(geometry.vocabulary or ())]
    positive = [value for value in values if value > 0] or [1.0]
    low, high = 10 ** np.floor(np.log10(min(positive))), 10 ** np.ceil(np.log10(max(positive)))
    axis = Axis(float(np.log10(low)), float(np.log10(high)), LEFT, RIGHT)

    def x(value: float) -> float:
        return axis(float(np.log10(max(value, low))))

    parts: list[Markup] = []
    y = 4.0
    if geometry.vocabulary:
        left, middle, right = (x(value) for value in geometry.vocabulary)
        parts.append(text(LEFT - 6, y + 11, "vocabulary", "small", "end"))
        parts.append(element("rect", x=left, y=y, width=max(right - left, 2.0), height=BAR, class_="band"))
        parts.append(line(middle, y, middle, y + BAR, "strong"))
        shown = " / ".join(f"{value:.3g}" for value in geometry.vocabulary)
        parts.append(text(RIGHT + 12, y + 11, f"1 / 50 / 99 %: {shown}", "small"))
        y += BAR + 4
    for source, name in enumerate(geometry.sources):
        parts.append(text(0, y + 14, f"{letter(source)}: {name}", "name"))
        y += LABEL
        own = geometry.norms[geometry.source_of == source].tolist()
        parts += [marker(source, x(value), y + BAR / 2) for value in own]
        parts.append(text(RIGHT + 12, y + 11, f"{min(own):.4g} to {max(own):.4g}", "small"))
        y += BAR + 4
    ticks = range(round(axis.low), round(axis.high) + 1)
    grid = []
    for tick in ticks:
        grid.append(line(axis(tick), 0, axis(tick), y, "grid"))
        grid.append(text(axis(tick), y + 16, f"{10.0**tick:g}", "small", "middle"))
    return drawing(y + BOTTOM, "Norms of the DefensiveTokens", *grid, *parts)


def cosines(geometry: Geometry) -> Markup:
    """Return the heat map of the cosines between tokens, each cell with its figure."""
    names, count = geometry.names, len(geometry.names)
    size = 44 if count <= 20 else 30
    edge = 40
    parts = []
    for row, name in enumerate(names):
        parts.append(text(edge - 4, edge + row * size + size / 2 + 4, name, "small", "end"))
        parts.append(text(edge + row * size + size / 2, edge - 6, name, "small", "middle"))
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
            parts.append(text(x + size / 2, y + size / 2 + 4, figure, "small", "middle"))
    extent = edge + count * size
    return drawing(extent, "Cosines between the DefensiveTokens", *parts, width=max(extent, 300))


def plane(geometry: Geometry) -> Markup:
    """Return the tokens in the plane of their two main components."""
    width, height, edge = 560, 400, 40
    low, high = geometry.plane.min(axis=0), geometry.plane.max(axis=0)
    across = Axis(float(low[0]), float(high[0]), edge + 20, width - edge)
    up = Axis(float(low[1]), float(high[1]), height - edge - 20, 20)
    frame = element("rect", x=edge, y=4, width=width - edge - 4, height=height - edge - 4, class_="frame")
    parts = []
    for (x, y), source, name in zip(geometry.plane.tolist(), geometry.source_of.tolist(), geometry.names, strict=True):
        parts.append(marker(source, across(x), up(y)))
        parts.append(text(across(x) + 9, up(y) + 4, name, "small"))
    first, second = geometry.explained
    labels = [
        text(width / 2, height - 14, f"first component, {percent(first)} % of the variance", "small", "middle"),
        element(
            "text",
            f"second component, {percent(second)} %",
            transform=f"translate(18 {height / 2}) rotate(-90)",
            text_anchor="middle",
            class_="small",
        ),
    ]
    return drawing(height, "Main plane of the DefensiveTokens", frame, *parts, *labels, width=width)


def learning_curves(curves: Sequence[Curve], kind: str) -> Markup | None:
    """Return the curves of `kind`, "loss" or "asr"; each has a colour, a marker and a letter."""
    shown = [(number, getattr(curve, kind)) for number, curve in enumerate(curves) if getattr(curve, kind)]
    if not shown:
        return None
    height, bottom, right = 300, 260, WIDTH - 110
    points = [point for _, own in shown for point in own]
    top = 1.0 if kind == "asr" else max(y for _, y in points)
    across = Axis(0, max(x for x, _ in points), 60, right)
    up = Axis(min(0.0, *(y for _, y in points)), top, bottom, 10)
    parts = []
    for quarter in range(5):
        value = up.low + quarter / 4 * (up.high - up.low)
        parts.append(line(60, up(value), right, up(value), "grid"))
        label = f"{100 * value:.0f} %" if kind == "asr" else f"{value:.3g}"
        parts.append(text(54, up(value) + 4, label, "small", "end"))
        step = quarter / 4 * across.high
        parts.append(text(across(step), bottom + 18, f"{step:.0f}", "small", "middle"))
    for number, own in shown:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in own)
        parts.append(element("polyline", points=path, class_=f"curve line{number % 6}"))
        if kind == "asr":
            parts += [marker(number, across(x), up(y)) for x, y in own]
        x, y = own[-1]
        parts.append(text(across(x) + 9 + 14 * (number % 6), up(y) + 4, letter(number), "small"))
    parts.append(text((60 + right) / 2, height - 4, "step", "small", "middle"))
    title = "Attack success rate while training" if kind == "asr" else "Training loss"
    return drawing(height, title, *parts)
