"""Figures for papers: PNG and SVG by matplotlib, the same bytes for the same input."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard.board import Group, Leaderboard
from dtt_plugin.leaderboard.charts import Steps, Trade, steps_of, steps_of_bounds, trade_of, trade_of_suite
from dtt_plugin.leaderboard.curves import Curve
from dtt_plugin.leaderboard.palette import COLOURS
from dtt_plugin.leaderboard.wording import WEAK_NATIVE, weak_mark
from dtt_plugin.public_names import public_name
from dtt_plugin.safe_text import all_printable
from dtt_plugin.tokens.geometry import Geometry, letter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sparse: an SVG holds every line of a hatch.
HATCHES = ("", "//", "\\\\", "||", "xx", "--")
MARKERS = ("o", "D", "s", "^", "P", "v")
DASHES = ("-", "--", ":", "-.", (0, (4, 2)), (0, (1, 1)))
_LONGEST_NAME = 100
_SETTINGS: Any = {
    "svg.hashsalt": "dtt",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # A model's name may hold a dollar sign; that makes no formula.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def write_figures(
    folder: Path, leaderboard: Leaderboard, geometries: Sequence[Geometry] = (), curves: Sequence[Curve] = ()
) -> list[Path]:
    """Write each figure as PNG and SVG into `folder`, and return the files.

    Args:
        folder: it is made if it does not exist.
        leaderboard: every group gets an `asr` figure, with ratios a `gap-closed` one, where answers are scored a
            `tradeoff`, and where an attack was optimised an `asr-against-steps`; a table over benchmarks with utility
            gets a `tradeoff-utility`. The files are named after kind and table. Soft attacks are in one
            `soft-attacks` figure.
        geometries: of token files, one `geometry` figure per embedding space.
        curves: of training logs, all in one `curves` figure.

    Raises:
        DttError: the folder can't be written, or there is no matplotlib.
    """
    if not find_spec("matplotlib"):
        raise DttError("Figures are drawn by matplotlib, which is not installed; pip install 'dtt-plugin[report]'.")
    files: list[Path] = []
    board: Leaderboard = all_printable(leaderboard)
    name = _Names()
    for suite in board.suites:
        if trade := trade_of_suite(suite):
            files += _save(folder / name("tradeoff-utility", suite.title), tradeoff(trade))
    for group in board.groups:
        if group.attacks or not group.measures:
            files += _save(folder / name("asr", group.title), asr_bars(group))
        if any(row.ratios for row in group.rows):
            files += _save(folder / name("gap-closed", group.title), gap_closed(group))
        if trade := trade_of(group):
            files += _save(folder / name("tradeoff", group.title), tradeoff(trade))
        if steps := steps_of(group):
            files += _save(folder / name("asr-against-steps", group.title), against_steps(steps))
    if steps := steps_of_bounds(board.bounds):
        files += _save(folder / "soft-attacks", against_steps(steps))
    for geometry in geometries:
        files += _save(folder / name("geometry", public_name(geometry.model)), geometry_figure(geometry))
    if curves:
        files += _save(folder / "curves", learning_curves(curves))
    return files


class _Names:
    """Names of files that say what they show, no two the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, kind: str, title: str) -> str:
        """Return for instance `asr-model-alpacafarm_injection`, with a number where that is taken."""
        words = re.sub(r"[^a-z0-9._]+", "-", title.lower()).strip("-.")
        name = stem = f"{kind}-{words}"[:_LONGEST_NAME].rstrip("-.")
        number = 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return name


def asr_bars(group: Group) -> Figure:
    """Return one bar with its interval per run and attack."""
    rows, attacks = [row for row in group.rows if row.asr], group.attacks
    with _figure(7, 1.2 + 0.2 * sum(len(attacks) + 1 for _ in rows)) as (figure, axes):
        height = 1 / (len(attacks) + 1)
        for series, attack in enumerate(attacks):
            own = [(place, row.asr[attack]) for place, row in enumerate(rows) if attack in row.asr]
            axes.barh(
                [place + (series - (len(attacks) - 1) / 2) * height for place, _ in own],
                [100 * rate.rate for _, rate in own],
                height,
                xerr=[
                    [100 * (rate.rate - rate.ends[0]) for _, rate in own],
                    [100 * (rate.ends[1] - rate.rate) for _, rate in own],
                ],
                label=attack,
                color=COLOURS[series % 6],
                hatch=HATCHES[series % 6],
                edgecolor="black",
                linewidth=0.6,
                error_kw={"elinewidth": 0.9, "capsize": 2},
            )
        axes.set_yticks(range(len(rows)), [row.run for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("attack success rate, % (95 % interval)")
        axes.set_title(group.title, fontsize=9)
        if rows:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def gap_closed(group: Group) -> Figure:
    """Return the gap-closed ratios with their intervals; lines at 0 (undefended) and 1 (native tokens)."""
    rows = [(row.run, row.ratios) for row in group.rows if row.ratios]
    with _figure(7, 1.2 + 0.45 * len(rows)) as (figure, axes):
        for series, kind in enumerate(("measured", "published")):
            own = [(place + 0.2 * series - 0.1, r[kind]) for place, (_, r) in enumerate(rows) if kind in r]
            values = [ratio.value for _, ratio in own]
            if not own:
                continue
            axes.errorbar(
                values,
                [place for place, _ in own],
                xerr=[
                    [max(0.0, ratio.value - _or(ratio.low, ratio.value)) for _, ratio in own],
                    [max(0.0, _or(ratio.high, ratio.value) - ratio.value) for _, ratio in own],
                ],
                fmt=MARKERS[series],
                color=COLOURS[series],
                ecolor="black",
                markeredgecolor="black",
                elinewidth=0.9,
                capsize=2,
                label=f"against the {kind} native tokens",
            )
        for end in (0, 1):
            axes.axvline(end, color="black", linewidth=0.8, linestyle="--")
        marks = ["".join({weak_mark(ratio) for ratio in ratios.values()}) for _, ratios in rows]
        names = [f"{run} {mark}".rstrip() for (run, _), mark in zip(rows, marks, strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        weak = f"\n{WEAK_NATIVE} the native tokens are themselves worse than a row of the table" if any(marks) else ""
        axes.set_xlabel(f"gap closed (0: undefended, 1: native tokens){weak}")
        axes.set_title(group.title, fontsize=9)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def tradeoff(trade: Trade) -> Figure:
    """Return ASR against right answers, one point an arm, with intervals on both axes."""
    title, attacked, measure, points = trade
    with _figure(6, 4) as (figure, axes):
        for number, (name, asr, answered) in enumerate(points):
            x, y = ((100 * rate.rate, [[100 * abs(rate.rate - end)] for end in rate.ends]) for rate in (answered, asr))
            axes.errorbar(
                [x[0]], [y[0]], xerr=x[1], yerr=y[1], fmt=MARKERS[number % 6], color=COLOURS[number % 6],
                ecolor="black", markeredgecolor="black", elinewidth=0.9, capsize=2, label=name,
            )  # fmt: skip
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"{measure}, % (95 % interval)")
        axes.set_ylabel(f"{attacked}, % (95 % interval)")
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def against_steps(steps: Steps) -> Figure:
    """Return hits against the optimiser's steps, and at the end of each line what lm-eval confirms."""
    with _figure(7, 4) as (figure, axes):
        last = max(curve[-1][0] for _, curve, _ in steps.curves)
        for number, (name, curve, confirmed) in enumerate(steps.curves):
            marker, colour = MARKERS[number % 6], COLOURS[number % 6]
            across, shares = zip(*curve, strict=True)
            axes.step(
                across, [100 * share for share in shares], where="post", color=colour, linestyle=DASHES[number % 6],
                label=name,
            )  # fmt: skip
            if confirmed:
                low, high = confirmed.ends
                axes.errorbar(
                    [last * (1.03 + 0.03 * number)], [100 * confirmed.rate],
                    yerr=[[100 * (confirmed.rate - low)], [100 * (high - confirmed.rate)]], fmt=marker, color=colour,
                    ecolor="black", markeredgecolor="black", elinewidth=0.9, capsize=2,
                )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(0, 102)  # a line at 100 is seen whole
        axes.set_xlabel(steps.across, fontsize=7)
        axes.set_ylabel("share of records, %")
        axes.set_title(steps.title, fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def geometry_figure(geometry: Geometry) -> Figure:
    """Return norms, cosine heat map and main plane side by side."""
    with _figure(12, 3.8, columns=3) as (figure, (norms, heat, plane)):
        for source, name in enumerate(geometry.sources):
            own = geometry.source_of == source
            style = {"color": COLOURS[source % 6], "marker": MARKERS[source % 6], "edgecolors": "black"}
            norms.scatter([source] * int(own.sum()), geometry.norms[own], **style)
            plane.scatter(*geometry.plane[own].T, label=f"{letter(source)}: {name}", **style)
        if geometry.vocabulary:
            low, middle, high = geometry.vocabulary
            norms.axhspan(low, high, color="0.8", label="vocabulary, 1 to 99 %")
            norms.axhline(middle, color="0.3", linestyle="--", label="its median")
            norms.legend(frameon=False)
        known = [norm for norm in (*geometry.norms.tolist(), *(geometry.vocabulary or ())) if norm > 0]
        if known:
            norms.set_yscale("log")
            # The default writes powers as formulas, which `_SETTINGS` turns off.
            norms.yaxis.set_major_formatter("{x:g}")
            norms.yaxis.set_minor_formatter("{x:g}")
            norms.set_ylim(min(known) / 2, max(known) * 2)
        norms.set_xticks(range(len(geometry.sources)), [letter(source) for source in range(len(geometry.sources))])
        norms.set_xlim(-0.6, len(geometry.sources) - 0.4)
        norms.set_ylabel("norm")
        image = heat.imshow(geometry.cosine, cmap="PuOr", vmin=-1, vmax=1)
        places = range(len(geometry.names))
        heat.set_xticks(places, geometry.names, rotation=90, fontsize=6)
        heat.set_yticks(places, geometry.names, fontsize=6)
        if len(places) <= 12:
            for row in places:
                for column in places:
                    value = geometry.cosine[row, column]
                    colour = "white" if abs(value) > 0.6 else "black"
                    heat.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=colour)
        figure.colorbar(image, ax=heat, label="cosine", shrink=0.8)
        first, second = (100 * share for share in geometry.explained)
        plane.set_xlabel(f"first component ({first:.0f} % of variance)")
        plane.set_ylabel(f"second component ({second:.0f} %)")
        plane.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.2))
        figure.suptitle(geometry.model, fontsize=9)
    return figure


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Return ASR and loss against the step, one dash and marker per training run."""
    with _figure(9, 3.4, columns=2) as (figure, (asr, loss)):
        for number, curve in enumerate(curves):
            style: dict[str, Any] = {"color": COLOURS[number % 6], "linestyle": DASHES[number % 6]}
            if curve.asr:
                steps, rates = zip(*curve.asr, strict=True)
                points = [100 * rate for rate in rates]
                asr.plot(steps, points, marker=MARKERS[number % 6], label=curve.label, **style)
            if curve.loss:
                loss.plot(*zip(*curve.loss, strict=True), label=curve.label, **style)
        for axes, label in ((asr, "attack success rate, %"), (loss, "training loss")):
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=7)
    return figure


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes, of the given size in inches, under this module's settings."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes = figure.subplots(1, columns)
        yield figure, axes


def _save(stem: Path, figure: Figure) -> list[Path]:
    from matplotlib import rc_context

    files = []
    # Without the date and the version that made it, the same input gives the same bytes.
    for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        path = stem.with_name(stem.name + ending)
        with rc_context(_SETTINGS), replacing(path) as temporary:
            figure.savefig(temporary, format=ending[1:], dpi=200, metadata=metadata)
        files.append(path)
    return files
