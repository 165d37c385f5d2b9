"""What a training run can be told; the defaults are the DefensiveTokens paper's where it states them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtt_plugin.checkpoint.defended import MOST_TOKENS
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.training_log import log_of

LABELS = ("self", "data")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEXT_INIT = "text:"
_HIGHEST_RATE = 1000  # ten times an ordinary row's norm in a step, and no overflow in Adam


@dataclass(frozen=True)
class TrainingOptions:
    """One training run."""

    model: str
    """Folder or hub id of the undefended chat model."""
    data: str
    """Training records: a JSON file, a folder or a hub id."""
    out: Path
    """The token file to write."""
    init: str = "random"
    """`random` (N(0, I)), `text:...` (the embeddings of its first k tokens), or a token file to adapt."""
    k: int = 5
    """Number of tokens."""
    steps: int | None = None
    """Optimiser steps; None: one pass over the records."""
    batch: int = 16
    """Examples a step (and a device)."""
    rate: float = 0.1
    """Learning rate of Adam, constant."""
    seed: int = 0
    """Of the start, the order of the records and the attacks."""
    labels: str = "self"
    """`self`: the undefended model's own greedy answer to the clean prompt; `data`: the records' outputs."""
    label_tokens: int = 128
    """Labels are cut at this many tokens."""
    held_out: int = 32
    """Records kept out of training, on which `eval_every` measures; 0 without it."""
    eval_every: int | None = None
    """Measure the ASR on the held-out records every so many steps, and keep the tokens of these steps."""
    stop_at: float | None = None
    """Stop once the held-out ASR(max) is at or below this share (0 to 1)."""
    save_every: int = 50
    """Write a checkpoint every so many steps."""
    resume: bool = False
    """Go on from the last checkpoint."""
    dtype: str = "auto"
    """Of the frozen weights; auto: float32 on a processor, the checkpoint's own elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    tokens_at_once: int = 512
    """Positions in one forward pass; a step takes as many passes as its examples need."""
    report_to: str = "none"
    """A tracker that the HF Trainer knows, such as trackio or wandb."""

    def __post_init__(self) -> None:
        for name in ("k", "batch", "label_tokens", "save_every", "tokens_at_once"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("steps", "eval_every"):
            self._check((getattr(self, name) or 1) >= 1 and getattr(self, name) != 0, name, "at least 1")
        self._check(self.k <= MOST_TOKENS, "k", f"at most {MOST_TOKENS}")
        self._check(0 < self.rate <= _HIGHEST_RATE, "rate", f"above 0 and at most {_HIGHEST_RATE}")
        self._check(0 <= self.seed < 2**32, "seed", "a whole number from 0 to 4294967295")
        self._check(self.held_out >= 0, "held_out", "0 or more")
        self._check(self.labels in LABELS, "labels", f"one of {', '.join(LABELS)}")
        self._check(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}")
        self._check(self.stop_at is None or 0 <= self.stop_at <= 1, "stop_at", "a share between 0 and 1")
        self._check(self.stop_at is None or bool(self.eval_every), "stop_at", "given together with --eval-every")
        self._check(not self.eval_every or self.held_out > 0, "held_out", "at least 1 with --eval-every")

    def _check(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise DttError(f"--{name.replace('_', '-')} {getattr(self, name)} is not possible; it has to be {wanted}.")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, beside the token file."""
        return self.out.with_name(f"{self.out.name}.checkpoints")

    @property
    def log(self) -> Path:
        """The training log, JSON lines beside the token file."""
        return log_of(self.out)

    def at_step(self, step: int) -> Path:
        """The token file of a step at which `eval_every` measured."""
        return self.out.with_name(f"{self._stem}.step-{step}.safetensors")

    @property
    def _stem(self) -> str:
        return self.out.name.removesuffix(".safetensors")
