"""The report as one HTML file that needs no network and trusts none of the texts in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from dtt_plugin.files.replacing import replacing
from dtt_plugin.leaderboard import charts, token_charts
from dtt_plugin.leaderboard.board import Leaderboard
from dtt_plugin.leaderboard.curves import Curve
from dtt_plugin.leaderboard.palette import style_sheet
from dtt_plugin.leaderboard.public import Public
from dtt_plugin.leaderboard.runs import Run
from dtt_plugin.leaderboard.sample_book import make_book
from dtt_plugin.leaderboard.sheets import (
    COSTS,
    any_title,
    arm_name,
    attack_matrix,
    bounds_sheet,
    published_sheet,
    remarks,
)
from dtt_plugin.leaderboard.utility import UTILITY
from dtt_plugin.leaderboard.verdicts import verdict
from dtt_plugin.leaderboard.wording import (
    cost_text,
    interval_text,
    p_text,
    percent,
    points,
    rate_text,
    ratio_text,
    test_text,
    weak_mark,
)
from dtt_plugin.safe_text import all_printable
from dtt_plugin.tokens.geometry import Geometry, letter


def write_report(
    out: Path,
    leaderboard: Leaderboard,
    runs: Sequence[Run],
    geometries: Sequence[Geometry] = (),
    curves: Sequence[Curve] = (),
    samples: bool = True,
    inputs: Sequence[Path] = (),
) -> None:
    """Write the report of a leaderboard to `out`.

    Args:
        out: the HTML file.
        leaderboard: the tables.
        runs: the runs whose samples can be looked at.
        geometries: of token files, to be shown.
        curves: of training logs, to be shown.
        samples: whether the page holds the records' texts, prompts and responses. Without them it can be
            published where the records' licence forbids it, so then it names no path of this machine either.
        inputs: the files and folders that were read, as the user named them.

    Raises:
        DttError: `out` can't be written.
    """
    html = render(leaderboard, runs, geometries, curves, samples, inputs)
    with replacing(out) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(
    leaderboard: Leaderboard,
    runs: Sequence[Run],
    geometries: Sequence[Geometry] = (),
    curves: Sequence[Curve] = (),
    samples: bool = True,
    inputs: Sequence[Path] = (),
) -> str:
    """Return the report's HTML, see `write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    assets = files("dtt_plugin.leaderboard") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style = style_sheet() + style
    environment = Environment(
        loader=PackageLoader("dtt_plugin.leaderboard", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = (
        letter, percent, points, p_text, rate_text, interval_text, test_text, ratio_text, weak_mark, cost_text,
        remarks, any_title, arm_name, verdict, attack_matrix, bounds_sheet, published_sheet,
    )  # fmt: skip
    environment.filters |= {form.__name__: form for form in forms}
    if not samples:
        models = [row.model for group in leaderboard.groups for row in group.rows]
        public = Public(models, geometries, inputs, leaderboard.files)
        leaderboard = public.all_of(leaderboard)
        geometries = [replace(g, model=public.text(g.model)) for g in geometries]
    board: Leaderboard = all_printable(leaderboard)
    shown = [run for run in runs if run.reader and run.task not in UTILITY] if samples else []
    book = make_book(shown)
    described = [{"label": run.label, "title": f"{run.model} · {run.task}"} for run in shown]
    html: str = environment.get_template("template.html.j2").render(
        policy=_policy(style, script),
        style=style,
        script=script,
        board=board,
        costs=COSTS,
        book=book,
        samples=samples,
        runs=all_printable(described),
        geometries=geometries,
        curves=curves,
        charts=charts,
        token_charts=token_charts,
    )
    return html


def _policy(style: str, script: str) -> str:
    """Return the content-security policy: this style sheet and this script, and nothing else whatever."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
