"""A run's files: what it may write, which run its folder holds, and the checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.state import state
from dtt_plugin.data.records import read_json
from dtt_plugin.errors import DttError
from dtt_plugin.files.locks import LOCK_SUFFIX
from dtt_plugin.files.locks import locked as locked_file
from dtt_plugin.tokens.files import DefensiveTokens
from dtt_plugin.training.options import TrainingOptions
from dtt_plugin.training.records import TrainingData

RUN_FILE = "run.json"
_LONGEST_NAME = 230  # of 255 bytes; temporary names and step numbers are longer
# What may differ between a run and its continuation without changing the result, save for rounding.
# Model and data are compared by their content.
_FREE = ("resume", "report_to", "save_every", "out", "tokens_at_once", "gradient_checkpointing", "model", "data")


def check_out(options: TrainingOptions) -> None:
    """Refuse at once what could not be written, or read again, after hours."""
    out = options.out
    if out.is_dir():
        raise DttError(f"--out {out} is a folder; name the token file to write.")
    if out.suffix == ".json":
        raise DttError(f"--out {out}: a token file is safetensors; name it so, and use `dtt convert` afterwards.")
    if options.log.is_dir():
        raise DttError(f"--out {out}: the log goes to {options.log}, which is a folder; name another file.")
    if re.fullmatch(re.escape(options.at_step(0).name).replace("0", r"\d+"), Path(options.init).name):
        raise DttError(f"--init {options.init} could be overwritten by this run's own files; choose another --out.")
    if len(os.fsencode(options.checkpoints.name)) > _LONGEST_NAME:
        raise DttError(f"--out {out.name}: the name is too long for the files beside it; choose a shorter one.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DttError(f"--out {out} can't be written ({error.strerror}); name another file.") from error


def run_identity(
    options: TrainingOptions, data: TrainingData, init: DefensiveTokens | None, steps: int
) -> dict[str, Any]:
    """Return what decides about a run's result; a continuation has to agree in all of it."""
    named = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in _FREE
    }
    checkpoint = open_checkpoint(options.model, need="all")
    return {
        **named,
        "steps": steps,
        "data_sha256": data.digest,
        "init": init.digest if init else options.init,
        "weights": state(str(checkpoint.folder)),
    }


def check_folder(options: TrainingOptions, run: dict[str, Any]) -> str:
    """Refuse to mix two runs' checkpoints, and to start over one that could be continued.

    Returns:
        When the run began, in ISO format.
    """
    now = datetime.now().isoformat()
    path = options.checkpoints / RUN_FILE
    if not path.is_file():
        if options.resume and options.out.exists():
            raise DttError(f"--resume: {options.out} is finished; leave the option out to train it anew.")
        return now
    if not options.resume:
        raise DttError(
            f"{options.checkpoints} holds an unfinished run: go on with --resume, or remove that folder to start over."
        )
    before = read_json(path)
    if changed := [name for name in run if before.get(name) != json.loads(json.dumps(run[name]))]:
        raise DttError(
            f"--resume: the run in {options.checkpoints} had other values of {', '.join(changed)}; give the same ones."
        )
    return str(before.get("date", now))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; one that a kill or a full disk cut off is removed.

    The Trainer writes `trainer_state.json` last.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal()]
    for path in sorted(found, key=lambda path: int(steps[path]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


@contextmanager
def locked(options: TrainingOptions) -> Iterator[None]:
    """Hold the run's folder alone; it goes when there is nothing in it to go on from.

    Raises:
        DttError: another process holds it.
    """
    options.checkpoints.mkdir(exist_ok=True)
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_file(options.checkpoints / LOCK_SUFFIX, wait=False))
            except BlockingIOError as error:
                raise DttError(
                    f"Another dtt train writes to {options.checkpoints}; wait for it, or name another --out."
                ) from error
            yield
    finally:
        with suppress(OSError):
            options.checkpoints.rmdir()
