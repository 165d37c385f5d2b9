"""`dtt fetch`: download the benchmark data and the published tokens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dtt_plugin.cli.output import add_json_option, show


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "fetch",
        help="download the benchmark data and the published tokens",
        description="Download data from its own homes into $DTT_DATA_DIR (default: the user's cache), and check its"
        " digests. By default the AlpacaFarm records, the attack sentences and the published DefensiveTokens, all"
        " three CC BY-NC 4.0: research use only. Size and licence are shown before each download; an interrupted one"
        " goes on where it stopped.",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SET",
        help="these files instead: alpacafarm, sep, cyberseceval2, bipia, piarena, injecagent, utility, or all; may be"
        " given again",
    )
    add_json_option(parser)
    parser.set_defaults(run=run, kept="complete files are kept, and the same command goes on where it was")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from dtt_plugin.data.fetch import SOURCES, chosen_sources, fetch
    from dtt_plugin.data.records import data_folder

    folder = data_folder()
    sources = chosen_sources(args.only) if args.only else SOURCES
    digests = fetch(folder, sources, tell=lambda line: print(line, file=sys.stderr, flush=True))
    licences = {source.name: source.licence for source in sources}
    report: dict[str, Any] = {"folder": str(folder)}
    if args.json:
        report["files"] = {name: {"sha256": d, "licence": licences[name]} for name, d in digests.items()}
    else:
        report |= {name: f"{digest}  ({licences[name]})" for name, digest in digests.items()}
    show(report, as_json=args.json)
    return 0
