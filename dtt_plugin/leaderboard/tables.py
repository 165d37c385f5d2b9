"""The leaderboard as text: terminal, Markdown, LaTeX, CSV.

Names come from files that may be anybody's: whatever a terminal, a Markdown or TeX processor or a
spreadsheet would obey is escaped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dtt_plugin.leaderboard.board import Leaderboard, row_dict
from dtt_plugin.leaderboard.sheets import legend, plain, sheets

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


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", text)


def markdown(board: Leaderboard, *, with_legend: bool = True) -> str:
    """Return the leaderboard as Markdown."""
    parts = []
    for sheet in sheets(board):
        lines = [f"## {escaped(sheet.title)}", "", *(f"{escaped(remark)}\n" for remark in sheet.remarks)]
        head, *rows = ("| " + " | ".join(map(escaped, row)) + " |" for row in (sheet.header, *sheet.rows))
        lines += [head, "|" + " --- |" * len(sheet.header), *rows]
        parts.append("\n".join(lines))
    parts += [escaped(legend(board))] if with_legend else []
    parts += [f"- {escaped(plain(problem))}" for problem in board.problems]
    return "\n\n".join(parts) + "\n"


def latex(board: Leaderboard) -> str:
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
    parts += [f"% {cell(plain(text))}" for text in (legend(board), *board.problems)]
    return "\n\n".join(parts) + "\n"


def comma_separated(board: Leaderboard) -> str:
    """Return the leaderboard as CSV: one line per row, each number of the JSON in a column of its own."""
    shared = ("reason", "discriminating", "ranked", "tests", "smallest_difference", "smallest_difference_holm")
    rows = [
        {
            "table": number,
            "title": group.title,
            **{name: getattr(group, name) for name in shared},
            "notes": " ".join(group.notes),
            **dict(_flat(row_dict(row))),
        }
        for number, group in enumerate(board.groups, 1)
        for row in group.rows
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
        elif not isinstance(entry, tuple):  # a curve is no cell
            yield f"{prefix}{name}", entry


def _harmless(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def print_terminal(board: Leaderboard) -> None:
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
    for problem in board.problems:
        console.print(Text(f"! {plain(problem)}"))
