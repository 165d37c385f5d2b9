"""`dtt cache`: the baked checkpoints that `dtt_vllm` keeps."""

from __future__ import annotations

import argparse
import time
from typing import Any

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.safe_text import one_line


def add_parser(subparsers: Any) -> None:
    """Add `dtt cache`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cache",
        help="list or prune the defended checkpoints that dtt_vllm keeps",
        description="dtt_vllm bakes a checkpoint for each model and token file it meets and keeps it; what "
        "does not change is linked to the base model. A damaged entry is baked again when it is used next, and "
        "prune removes it in any case. DTT_CACHE_DIR moves the cache.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the entries, the latest used first")
    pruning = actions.add_parser("prune", help="remove entries")
    pruning.add_argument(
        "--older-than",
        type=float,
        default=0.0,
        metavar="DAYS",
        help="only those that were not used for so long (default: any)",
    )
    pruning.add_argument("--keep", type=int, default=0, metavar="N", help="keep the N latest used (default: 0)")
    for action in (listing, pruning):
        add_json_option(action)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt cache`."""
    from dtt_plugin.bake import baked_folder, cached_checkpoints, prune
    from dtt_plugin.errors import DttError

    if args.action == "prune":
        if args.keep < 0 or args.older_than < 0:
            raise DttError("--keep and --older-than can't be negative.")
        entries = prune(older_than_days=args.older_than, keep=args.keep)
    else:
        entries = cached_checkpoints()
    rows = [
        {
            "key": entry.key,
            "base_model": entry.base_model,
            "tokens_sha256": entry.tokens_sha256,
            "disk_bytes": entry.disk_bytes,
            "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            "damaged": entry.damaged,
        }
        for entry in entries
    ]
    name = "removed" if args.action == "prune" else "entries"
    freed = sum(entry.disk_bytes for entry in entries)
    if args.json:
        show({"folder": str(baked_folder()), name: rows, "disk_bytes": freed}, as_json=True)
        return 0
    show({"folder": str(baked_folder()), name: len(rows), "disk_MB": freed / 1e6}, as_json=False)
    for entry, row in zip(entries, rows, strict=True):
        damaged = "damaged  " if entry.damaged else ""
        base = one_line(entry.base_model)
        print(f"{entry.key}  {row['used']}  {entry.disk_bytes / 1e6:9.1f} MB  {damaged}{base}")
    return 0
