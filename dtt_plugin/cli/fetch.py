"""`dtt fetch`: download the benchmark data and the published tokens."""

from __future__ import annotations

import argparse
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "fetch",
        help="download the benchmark data and the published tokens",
        description="Download the AlpacaFarm records, the attack sentences and the published DefensiveTokens from"
        " their own homes into $DTT_DATA_DIR (default: the user's cache), and check their digests. All three are"
        " CC BY-NC 4.0: research use only.",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.data.fetch import SOURCES, fetch
    from dtt_plugin.data.records import data_folder

    folder = data_folder()
    digests = fetch(folder)
    licences = {source.name: source.licence for source in SOURCES}
    report: dict[str, Any] = {"folder": str(folder)}
    if args.json:
        report["files"] = {name: {"sha256": d, "licence": licences[name]} for name, d in digests.items()}
    else:
        report |= {name: f"{digest}  ({licences[name]})" for name, digest in digests.items()}
    show(report, as_json=args.json)
    return 0
