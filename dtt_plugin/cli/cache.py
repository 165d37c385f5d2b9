"""`dtt cache`: what is kept because it can be made or fetched again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtt_plugin.cli.output import add_json_option, show
from dtt_plugin.safe_text import one_line

if TYPE_CHECKING:
    from dtt_plugin.bake.cache import CachedCheckpoint

_NAMES = ("alignments", "baked", "labels", "data", "models")


def add_parser(subparsers: Any) -> None:
    """Add `dtt cache`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cache",
        help="list or prune what is kept: baked checkpoints, alignments, labels, downloads, models",
        description="Baked checkpoints are what dtt_vllm makes for each model and token file it meets; what does not "
        "change in them is linked to the base model, and a damaged one is baked again when it is used next. Alignments "
        "are kept by dtt align, labels by dtt train and probe, downloads (data) by dtt fetch, models by dtt demo. "
        "DTT_CACHE_DIR moves all of them.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list", help="list every cache's size, and the baked checkpoints, the latest used first"
    )
    pruning = actions.add_parser("prune", help="remove entries")
    pruning.add_argument(
        "--of",
        nargs="+",
        choices=_NAMES,
        default=["baked"],
        metavar="CACHE",
        help=f"of which caches: {', '.join(_NAMES)} (default: baked)",
    )
    pruning.add_argument(
        "--older-than",
        type=float,
        default=0.0,
        metavar="DAYS",
        help="only those that were not used for so long (default: any)",
    )
    pruning.add_argument(
        "--keep", type=int, default=0, metavar="N", help="keep the N latest used of each cache (default: 0)"
    )
    for action in (listing, pruning):
        add_json_option(action)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `dtt cache`."""
    return _prune(args) if args.action == "prune" else _list(args)


def _list(args: argparse.Namespace) -> int:
    from dtt_plugin.bake import baked_folder, cached_checkpoints
    from dtt_plugin.files.cache import CACHES, UNBOUNDED

    baked = cached_checkpoints()
    caches: list[dict[str, Any]] = []
    for cache in CACHES:
        entries = cache.entries()
        size = sum(entry.disk_bytes for entry in entries)
        bound = None if cache.most == UNBOUNDED else cache.most
        caches.append(
            {
                "cache": cache.name,
                "folder": str(cache.folder),
                "entries": len(entries),
                "disk_bytes": size,
                "most": bound,
            }
        )
    if args.json:
        freed = sum(entry.disk_bytes for entry in baked)
        found = {"folder": str(baked_folder()), "entries": _rows(baked), "disk_bytes": freed, "caches": caches}
        show(found, as_json=True)
        return 0
    for row in caches:
        most = f", at most {row['most']}" if row["most"] else ""
        megabytes = f"{row['disk_bytes'] / 1e6:9.1f} MB"
        print(f"{row['cache']:<10}  {megabytes}  {row['entries']} entries{most}  {one_line(row['folder'])}")
    _print(baked)
    return 0


def _prune(args: argparse.Namespace) -> int:
    from dtt_plugin.bake import baked_folder, prune
    from dtt_plugin.errors import DttError
    from dtt_plugin.files.cache import CACHES

    if args.keep < 0 or args.older_than < 0:
        raise DttError("--keep and --older-than can't be negative.")
    days, keep = args.older_than, args.keep
    baked = prune(older_than_days=days, keep=keep) if "baked" in args.of else []
    named = [cache for cache in CACHES if cache.name in args.of and cache.name != "baked"]
    others = {cache.name: cache.prune(older_than_days=days, keep=keep) for cache in named}
    freed = sum(entry.disk_bytes for entry in baked)
    freed += sum(entry.disk_bytes for entries in others.values() for entry in entries)
    if args.json:
        names = {name: [str(entry.path) for entry in entries] for name, entries in others.items()}
        found = {"folder": str(baked_folder()), "removed": _rows(baked), "disk_bytes": freed, "removed_of": names}
        show(found, as_json=True)
        return 0
    show({"removed": len(baked) + sum(map(len, others.values())), "disk_MB": freed / 1e6}, as_json=False)
    for name, entries in others.items():
        for removed in entries:
            print(f"{name}  {one_line(removed.path.name)}  {removed.disk_bytes / 1e6:9.1f} MB")
    _print(baked)
    return 0


def _rows(entries: Sequence[CachedCheckpoint]) -> list[dict[str, Any]]:
    return [
        {
            "key": entry.key,
            "base_model": entry.base_model,
            "tokens_sha256": entry.tokens_sha256,
            "disk_bytes": entry.disk_bytes,
            "used": _day(entry.used),
            "damaged": entry.damaged,
        }
        for entry in entries
    ]


def _print(entries: Sequence[CachedCheckpoint]) -> None:
    for entry in entries:
        damaged = "damaged  " if entry.damaged else ""
        print(
            f"{entry.key}  {_day(entry.used)}  {entry.disk_bytes / 1e6:9.1f} MB  {damaged}{one_line(entry.base_model)}"
        )


def _day(used: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
