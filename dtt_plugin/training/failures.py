"""What stops a run from outside: a full disk, too little memory. Each becomes one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from dtt_plugin.errors import DttError
from dtt_plugin.training.options import TrainingOptions


@contextmanager
def told_plainly(options: TrainingOptions) -> Iterator[None]:
    """Turn what can go wrong inside into a `DttError` that says which option helps."""
    try:
        yield
    except ImportError as error:
        raise DttError(f"dtt train needs {error.name}; install it with pip install 'dtt-plugin[train]'.") from error
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise DttError(
                f"The disk of {options.checkpoints} is full; make room, and go on with --resume from the last whole"
                " checkpoint."
            ) from error
        if not is_out_of_memory(error):
            raise
        raise DttError(
            f"Out of memory with --tokens-at-once {options.tokens_at_once} and --batch {options.batch}: lower"
            " --tokens-at-once first (the result stays the same), or add --gradient-checkpointing; where the run had"
            " begun, with --resume."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, whoever says it."""
    import torch

    said = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


def _is_disk_full(error: BaseException) -> bool:
    text = str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    # How torch.save tells of it.
    return full or "PytorchStreamWriter failed" in text or "file write failed" in text
