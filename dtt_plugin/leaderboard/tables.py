"""The leaderboard as text: terminal, Markdown, LaTeX, CSV. All from the same dictionary, so all with the same numbers.

Names come from files that may be anybody's: whatever a terminal, a Markdown or TeX processor or a
spreadsheet would obey is escaped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dtt_plugin.leaderboard.marks import weak_mark
from dtt_plugin.safe_text import printable

COSTS = {
    "align_s": "alignment",
    "transfer_s": "transfer",
    "bake_s": "baking",
    "pipeline_s": "whole pipeline",
    "evaluation_s": "evaluation",
    "peak_memory_mb": "peak memory",
    "speedup": "speed-up",
}
"""The cost columns: their names in the JSON, and their titles."""
NOISE = "n.s."
UNDEFINED = "undefined"
_LEGEND = (
    "Rates: hits/n and exact (Clopper-Pearson) 95 % intervals; ASR(max), the highest of the attacks' rates: {asr_max}. "
    "vs: difference in the share of records on which any attack worked; {tests}. "
    f"{NOISE}: cannot be told from noise (adjusted p of 5 % or more). "
    "Gap closed: (ASR(max) undefended - row) / (undefended - native), with a bootstrap interval; "
    f"{UNDEFINED} where the denominator cannot be told from zero. "
    "Speed-up: {speed-up}."
)
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "†": r"\dag{}",
    "·": r"\textperiodcentered{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


_Columns = dict[str, Callable[[Any], str]]
"""Per column its title, and what makes a row's cell."""


class Sheet(NamedTuple):
    """One table: a header and rows of cells as text, with what stands above and below."""

    title: str
    remarks: list[str]
    header: list[str]
    rows: list[list[str]]


def plain(text: object) -> str:
    """Return a name or text on one line, with control characters spelt out."""
    return " ".join(printable(str(text)).split())


def percent(share: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """Return for instance `0/208 = 0.0 % [0.0, 1.8]`; a published figure has neither counts nor interval."""
    if rate is None:
        return "-"
    counts = f"{rate['hits']}/{rate['n']} = " if rate["hits"] is not None else ""
    interval = f" [{percent(rate['low'])}, {percent(rate['high'])}]" if rate["low"] is not None else ""
    return f"{counts}{percent(rate['rate'])} %{interval}"


def _attack_text(attack: str, row: Mapping[str, Any]) -> str:
    return rate_text(row["asr"].get(attack))


def p_text(p: float) -> str:
    """Return a p value."""
    return "p<0.0001" if p < 0.0001 else f"p={p:.4f}"


def _test_text(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "-"
    return f"{100 * test['effect']:+.1f} pp, {p_text(test['p_holm'])}" + (
        "" if test["told_from_noise"] else f" {NOISE}"
    )


def ratio_text(gap: Mapping[str, Any] | None, kind: str) -> str:
    """Return a row's gap-closed ratio, measured or published; `-` where there is nothing to close it against."""
    if gap is None or kind not in gap:
        return "-"
    ratio = gap[kind]
    if ratio is None:
        return UNDEFINED
    interval = f" [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio["low"] is not None else ""
    return f"{ratio['value']:.3f}{interval}{weak_mark(ratio)}"


def _name(row: Mapping[str, Any], title: str) -> str:
    """Return the row's label without what stands in the table's title, with its marks."""
    name = plain(row["run"])
    for part in title.split(" · "):
        name = re.sub(rf" · {re.escape(part)}(?= · | #\d|$)", "", name)
    marks = [mark.replace("_", " ") for mark in ("limited", "early_decision") if row.get(mark)]
    marks += [f"{row['unfinished']} unfinished"] if row.get("unfinished") else []
    return name + "".join(f" ({mark})" for mark in marks)


def sheets(board: Mapping[str, Any]) -> Iterator[Sheet]:
    """Yield, for each group, three tables that fit a page: the rates, the tests and ratios, the costs."""
    for group in board["groups"]:
        rows, title = group["rows"], plain(group["title"])
        attacks = list(dict.fromkeys(attack for row in rows for attack in row["asr"]))
        rates: _Columns = {f"ASR {plain(attack)}": partial(_attack_text, attack) for attack in attacks}
        if attacks:
            rates["ASR(max)"] = lambda row: rate_text(row["asr_max"])
            rates["ASR(any)"] = lambda row: rate_text(row["asr_any"])
        rates["refusal"] = lambda row: rate_text(row["refusal"])
        yield _sheet(title, remarks(group), rates, rows)
        if attacks:
            tests: _Columns = {
                "vs undefended": lambda row: _test_text(row["vs_undefended"]),
                "vs native": lambda row: _test_text(row["vs_native"]),
                "gap closed, measured": lambda row: ratio_text(row["gap_closed"], "measured"),
                "gap closed, published": lambda row: ratio_text(row["gap_closed"], "published"),
            }
            tested = [row for row in rows if not row["published"]]
            yield _sheet(f"{title} · tests and ratios", [], tests, tested)
        costs: _Columns = {column: partial(_cost, name) for name, column in COSTS.items()}
        if costed := [row for row in rows if any(row["cost"].values())]:
            yield _sheet(f"{title} · cost", [], costs, costed)


def _sheet(title: str, remarks: list[str], columns: _Columns, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    body = [[_name(row, title), *(cell(row) for cell in columns.values())] for row in rows]
    return Sheet(title, remarks, ["run", *columns], body)


def _cost(name: str, row: Mapping[str, Any]) -> str:
    return cost_text(row["cost"], name)


def cost_text(costs: Mapping[str, float | None], name: str) -> str:
    """Return one of a row's costs, with its unit."""
    value = costs[name]
    if value is None:
        return "-"
    if name == "peak_memory_mb":
        return f"{value:.0f} MB"
    if name == "speedup":
        return f"{value:.1f} x"
    return f"{value:.1f} s" if value >= 1 else f"{value:.3g} s"


def remarks(group: Mapping[str, Any]) -> list[str]:
    """Return what has to be said about a table: why it stands apart, its notes, what its n separates."""
    found = [plain(note) for note in (group["reason"], *group["notes"]) if note]
    least, family, tests = (group[name] for name in ("smallest_difference", "smallest_difference_holm", "tests"))
    if least is None:
        found.append(f"n = {group['n']}: too few records to separate any difference.")
    else:
        after = f"; {percent(family)} pp in this table's {tests} tests" if family and tests > 1 else ""
        found.append(f"n = {group['n']}: the smallest difference that can be separated is {percent(least)} pp{after}.")
    if any(row["limited"] for row in group["rows"]):
        found.append("limited: a run over a part of the records (--limit), for testing only.")
    if not group["ranked"]:
        found.append("Not ranked.")
    return found


def legend(board: Mapping[str, Any]) -> str:
    """Return what a reader has to know about the columns."""
    return _LEGEND.format(**board["method"])


def markdown(board: Mapping[str, Any]) -> str:
    """Return the leaderboard as Markdown."""

    def cell(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", text)

    parts = []
    for sheet in sheets(board):
        lines = [f"## {cell(sheet.title)}", "", *(f"{cell(remark)}\n" for remark in sheet.remarks)]
        head, *rows = ("| " + " | ".join(map(cell, row)) + " |" for row in (sheet.header, *sheet.rows))
        lines += [head, "|" + " --- |" * len(sheet.header), *rows]
        parts.append("\n".join(lines))
    parts.append(cell(legend(board)))
    parts += [f"- {cell(plain(problem))}" for problem in board["problems"]]
    return "\n\n".join(parts) + "\n"


def latex(board: Mapping[str, Any]) -> str:
    """Return the leaderboard as LaTeX tables for the package booktabs."""

    def cell(text: str) -> str:
        # What a Latin TeX can't set is better missing than an error.
        return "".join(_TEX.get(c) or c.encode("latin-1", "replace").decode("latin-1") for c in text)

    parts = ["% \\usepackage{booktabs,graphicx}"]
    for sheet in sheets(board):
        lines = [
            r"\begin{table}",
            r"\centering",
            # Seven columns of rates with their intervals are wider than a page.
            r"\resizebox{\textwidth}{!}{%",
            r"\begin{tabular}{l" + "r" * (len(sheet.header) - 1) + "}",
            r"\toprule",
        ]
        lines += [" & ".join(map(cell, sheet.header)) + r" \\", r"\midrule"]
        # A row that begins with a bracket would be read as an argument of \\.
        lines += ["{}" + " & ".join(map(cell, row)) + r" \\" for row in sheet.rows]
        caption = " ".join([f"{sheet.title}.", *sheet.remarks])
        lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{cell(caption)}}}", r"\end{table}"]
        parts.append("\n".join(lines))
    parts += [f"% {cell(plain(text))}" for text in (legend(board), *board["problems"])]
    return "\n\n".join(parts) + "\n"


def comma_separated(board: Mapping[str, Any]) -> str:
    """Return the leaderboard as CSV: one line per row, each number of the JSON in a column of its own."""
    shared = ("reason", "discriminating", "ranked", "tests", "smallest_difference", "smallest_difference_holm")
    rows = [
        {
            "table": number,
            "title": group["title"],
            **{name: group[name] for name in shared},
            "notes": " ".join(group["notes"]),
            **dict(_flat(row)),
        }
        for number, group in enumerate(board["groups"], 1)
        for row in group["rows"]
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    # A test that one row lacks is a table of columns in another row.
    header = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_harmless(name) for name in header])
    writer.writerows([[_harmless(row.get(name)) for name in header] for row in rows])
    return text.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _harmless(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def print_terminal(board: Mapping[str, Any]) -> None:
    """Print the leaderboard with rich."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    for sheet in sheets(board):
        table = Table(title=Text(sheet.title), title_justify="left", box=box.SIMPLE_HEAD)
        for name in sheet.header:
            table.add_column(Text(name), overflow="fold")  # no figure loses its end in a narrow window
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for remark in sheet.remarks:
            console.print(Text(remark), style="bold" if "NOT DISCRIMINATING" in remark else "")
    console.print(Text(legend(board)), style="dim")
    for problem in board["problems"]:
        console.print(Text(f"! {plain(problem)}"))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a small table of cells in aligned columns."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
