"""How often models have to be loaded for the cells of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.serving.hooks import untried
from dtt_plugin.serving.placing import have_room
from dtt_plugin.sweep.file import Cell, Load


def sharing_a_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells by what a model is loaded with, DefensiveTokens and prompt format apart."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        load = cell.load
        key = [load.engine, load.task, load.settings, load.model_args, load.model]
        groups.setdefault(sha256_json(key), []).append(cell)
    return list(groups.values())


def count_loads(cells: Sequence[Cell]) -> int:
    """Return how many times a model will be loaded, as far as can be told before it is.

    A model that is not on this disk counts once for each token file, and once without.

    Raises:
        DttError: a cell can't be run.
    """
    return sum(_loads(group) for group in sharing_a_model(cells))


def _loads(cells: Sequence[Cell]) -> int:
    """Return how often one model is loaded: once where its tokens find places beside it, else once a token file."""
    load = cells[0].load
    sizes = {
        sha256_json(cell.load.identity["tokens"]): tokens.k(load.model)
        for cell in cells
        if (tokens := cell.load.tokens) is not None
    }
    separate = len(sizes) + any(cell.load.tokens is None for cell in cells)
    return 1 if separate > 1 and _beside(load, list(sizes.values())) else separate


def _beside(load: Load, sizes: Sequence[int]) -> bool:
    given = load.model_args
    elsewhere = str(given.get("baked")).lower() in ("true", "1") or given.keys() & {"tokenizer", "kv_transfer_config"}
    if load.engine != "dtt_vllm" or elsewhere or load.identity["weights"] is None or untried() is not None:
        return False
    try:
        return have_room(load.model, sizes, revision=given.get("revision"))
    except DttError:  # which baking may not mind
        return False
