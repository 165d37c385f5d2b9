"""Runs the cells of a sweep that are not finished yet, one process per model in memory."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from dtt_plugin import __version__
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.locks import LOCK_SUFFIX, locked
from dtt_plugin.quiet import Event, run_quietly
from dtt_plugin.safe_text import printable
from dtt_plugin.sweep.file import ADAPTERS, Cell, Load, TokenSource
from dtt_plugin.sweep.loads import sharing_a_model
from dtt_plugin.tokens.files import load_tokens, save_tokens

logger = logging.getLogger("dtt_plugin")

LOG = "log.txt"
WORKER = "dtt_plugin.sweep.worker"
Listen = Callable[[Event], None]


def _ignore(event: Event) -> None:
    pass


def download_settings(cells: Sequence[Cell]) -> None:
    """Download the small files of hub models, so that the commits are known that will be loaded.

    A model that can't be had fails when its cells run.
    """
    wanted = set()
    for load in {id(cell.load): cell.load for cell in cells}.values():
        revision = load.model_args.get("revision")
        models = [load.model, *(load.model_args.get(name) for name in ADAPTERS)]
        wanted |= {(model, revision and str(revision)) for model in models if isinstance(model, str)}
        if load.tokens and load.tokens.source_model:
            wanted.add((load.tokens.source_model, None))
    for model, revision in wanted:
        if not os.path.exists(os.path.expanduser(model)):
            with suppress(DttError):
                open_checkpoint(model, revision=revision, need="tokenizer")


def run_sweep(cells: Sequence[Cell], out: Path, *, verbose: bool = False, listen: Listen = _ignore) -> list[Cell]:
    """Run the cells that are not finished yet, each model loaded as seldom as can be, and return those that failed.

    A failure is told and does not stop the cells of other models.

    Args:
        cells: of a sweep file.
        out: the sweep's folder; what engines and libraries print goes into `log.txt` there.
        verbose: leave all of that on the terminal.
        listen: called with each event of `dtt_plugin.sweep.worker`: `step` (what runs now, None at the end), `done`,
            `total` and `what` of the progress bar that moved last, `warning`, `error`.

    Raises:
        DttError: another sweep runs in `out`, or it is no place for results.
    """
    failed = []
    with owned(out):
        for part in sharing_a_model(cells):
            failed += _failed_of(part, out, None if verbose else out / LOG, listen)
    return failed


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Make the folder `out`, without what a killed sweep left unfinished there, and keep other sweeps from it.

    Raises:
        DttError: another sweep runs in it, or it is no place for results.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DttError(f"--out {out} can't be a folder ({error.strerror}); give another.") from error
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / LOCK_SUFFIX, wait=False))
        except BlockingIOError as error:
            raise DttError(f"Another sweep runs in {out}; wait for it, or give another --out.") from error
        shutil.rmtree(out / "partial", ignore_errors=True)
        yield


def _failed_of(cells: Sequence[Cell], out: Path, log: Path | None, listen: Listen) -> list[Cell]:
    """Run those cells of one model that are not finished yet, in as few processes as can be; return the failed ones.

    A process that ends before its last cell needs another load for the next. Where one fails, the load of the cell
    that it was at has failed, and the others go on.
    """
    loads = [(load, list(group)) for load, group in groupby(cells, key=lambda cell: cell.load)]
    failed: list[Cell] = []

    def lose(lost: Sequence[Cell], error: Exception) -> None:
        reason = str(error) if isinstance(error, DttError) else f"{type(error).__name__}: {error}"
        listen({"error": reason})
        print(failure(lost, reason), file=sys.stderr, flush=True)
        failed.extend(lost)

    while loads:
        jobs: list[dict[str, Any]] = []
        ready: list[tuple[Load, list[Cell]]] = []
        for load, group in loads:
            pending = group
            try:
                pending = [cell for cell in group if not cell.is_finished(out)]
                if pending:
                    jobs.append(job_of(load, pending, out, listen))
                    ready.append((load, pending))
            except Exception as error:  # whatever it is: it concerns this load, and others take hours
                lose(pending, error)
        if not ready:
            break
        together = [cell for _, group in ready for cell in group]
        logger.info("%s: %s", ready[0][0].model, ", ".join(cell.name for cell in together))
        fault: Exception | None = None
        try:
            run_quietly(WORKER, jobs[0] | {"cells": [c for job in jobs for c in job["cells"]]}, log=log, listen=listen)
        except Exception as error:  # as above
            fault = error
        rest = [(load, [cell for cell in group if not cell.is_finished(out)]) for load, group in ready]
        loads = [(load, left) for load, left in rest if left]
        if loads and (fault or sum(len(left) for _, left in loads) == len(together)):
            lose(loads.pop(0)[1], fault or DttError("the model can't be loaded for this arm."))
    return failed


def failure(cells: Sequence[Cell], reason: str) -> str:
    """Return the line that tells why `cells` can't be run."""
    return f"dtt sweep: {', '.join(cell.name for cell in cells)} can't be run: {printable(reason)}"


def job_of(load: Load, cells: Sequence[Cell], out: Path, listen: Listen) -> dict[str, Any]:
    """Return the job of `dtt_plugin.sweep.worker` that evaluates `cells`; tokens are transferred first.

    Raises:
        DttError: the model is not there, or not any more what it was when the sweep began.
    """
    if load.identity["weights"] is None:
        raise DttError(f"{load.model} is no folder and no model that the hub gives; check the name, or go online.")
    if replace(load, tokens=load.tokens and replace(load.tokens)).identity != load.identity:
        raise DttError(f"{load.model}, its adapter or its tokens were changed while the sweep ran; start it again.")
    arm = {"prompt_format": load.prompt_format} if load.prompt_format else {}
    if load.tokens:
        if load.tokens.method == "procrustes":
            listen({"step": "align and transfer"})
        arm |= token_arguments(load, load.tokens, out)
    return {
        "engine": load.engine,
        "task": load.task,
        "model_args": {**load.model_args, "pretrained": load.model},
        **load.settings,
        "cells": [
            {
                "name": cell.name,
                "arm": {**arm, "defense": cell.defense},
                "key": cell.key,
                "folder": str(cell.folder(out)),
            }
            for cell in cells
        ],
    }


def token_arguments(load: Load, tokens: TokenSource, out: Path) -> dict[str, str]:
    """Return the model arguments for the tokens, transferred first where the grid asks for it."""
    if tokens.source_model is None or tokens.method is None:
        entry = tokens.entry(load.model)
        return {"tokens": str(tokens.file)} | ({"tokens_model": entry} if entry else {})
    key = sha256_json([__version__, load.model, load.identity["tokens"], load.identity["weights"]])
    target = out / "tokens" / f"{key[:16]}.safetensors"
    try:
        load_tokens(target)
    except DttError:  # not there yet, or damaged
        from dtt_plugin.alignment import AlignmentCache, align, cache_folder
        from dtt_plugin.transfer.move import transfer

        alignment = None
        if tokens.method == "procrustes":
            source = open_checkpoint(tokens.source_model)
            cache = AlignmentCache(cache_folder())
            alignment = align(source, open_checkpoint(load.model), cache=cache, progress=True)
        own = load_tokens(tokens.file, model=tokens.entry(tokens.source_model))
        save_tokens(target, transfer(own, alignment, method=tokens.method, target_model=load.model))
    return {"tokens": str(target)}
