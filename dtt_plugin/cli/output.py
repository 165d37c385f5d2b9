"""What the commands print: JSON for scripts, aligned lines for people."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dtt_plugin.safe_text import json_text, one_line


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Give a command `--json`."""
    parser.add_argument("--json", action="store_true", default=False, help="print the result as JSON, for scripts")


def show(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print `report`: one JSON object, or one `name  value` line per entry.

    What a file says may stand in it: as lines it can't end one, nor tell a terminal to do anything.
    """
    if as_json:
        print(json_text(report))
        return
    lines = [line for name, value in report.items() for line in _lines(name, value)]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _lines(name: str, value: Any) -> list[tuple[str, str]]:
    """Return an entry as (name, value); of a table one per entry, under the table's name."""
    if isinstance(value, Mapping):
        within = [line for key, entry in value.items() for line in _lines(str(key), entry)]
        return [(f"{name}: {key}", line) for key, line in within]
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, list | tuple):
        value = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return [(one_line(name.replace("_", " ")), one_line(str(value)))]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a small table of cells in aligned columns."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
