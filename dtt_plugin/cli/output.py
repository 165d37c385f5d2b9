"""What the commands print: JSON for scripts, aligned lines for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Give a command `--json`."""
    parser.add_argument("--json", action="store_true", default=False, help="print the result as JSON, for scripts")


def show(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print `report`: one JSON object, or one `name  value` line per entry."""
    if as_json:
        text = json.dumps(report, indent=2, ensure_ascii=False)
        # Half a surrogate pair (a file's name that is no UTF-8) has no bytes; its escape is JSON again.
        print(text.encode("utf-8", "backslashreplace").decode())
        return
    width = max(map(len, report), default=0)
    for name, value in report.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, list | tuple):
            value = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        print(f"{name.replace('_', ' '):<{width}}  {value}")
