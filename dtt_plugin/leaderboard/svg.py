"""Shapes of inline SVG. Colours come from the page's style sheet, texts are escaped by markupsafe."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 900
BAR = 14
LABEL = 20
# The plot's left and right edge; to the right of it stand the figures.
LEFT, RIGHT = 140, 640
BOTTOM = 24


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """Return one SVG element; `_` in an attribute's name stands for `-`, `class_` for `class`."""
    names = (("class" if name == "class_" else name.replace("_", "-"), value) for name, value in attributes.items())
    written = Markup("").join(Markup(' {}="{}"').format(name, _plain(value)) for name, value in names)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(map(escape, children)))


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def drawing(height: float, title: str, *children: str, width: float = WIDTH) -> Markup:
    """Return a chart of the given extent, with the title that a screen reader tells."""
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {width} {height:.0f}",
        width=width,
        role="img",
        class_="chart",
    )


def text(x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> Markup:
    """Return a text at a place; `anchor` is start, middle or end."""
    return element("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a line between two places."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


class Axis:
    """A linear scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self.start, self.stop = low, high if high > low else low + 1, start, stop

    def __call__(self, value: float) -> float:
        """Return where a value stands; one past an end stands there."""
        clipped = min(max(value, self.low), self.high)
        return self.start + (clipped - self.low) / (self.high - self.low) * (self.stop - self.start)


def grid(axis: Axis, bottom: float, ticks: Sequence[float], *, percent_ticks: bool = False) -> list[Markup]:
    """Return upright lines down to `bottom`, each with its value below."""
    parts = []
    for tick in ticks:
        parts.append(line(axis(tick), 0, axis(tick), bottom, "grid"))
        label = f"{100 * tick:.0f} %" if percent_ticks else f"{tick:g}"
        parts.append(text(axis(tick), bottom + 16, label, "small", "middle"))
    return parts


def marker(series: int, x: float, y: float) -> Markup:
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
