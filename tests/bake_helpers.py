"""What the tests of baking share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.tokens import DefensiveTokens
from tests.checkpoints import make_checkpoint


def random_tokens(
    width: int, *, k: int = 5, seed: int = 1, scale: float = 30.0, prompt_format: str = "model"
) -> DefensiveTokens:
    rows = np.random.default_rng(seed).standard_normal((k, width)) * scale
    return DefensiveTokens(rows.astype(np.float32), "a model", "random", prompt_format)


def tiny(folder: Path, **options: Any) -> Path:
    """A base model with an output head peaked enough that greedy decoding is stable."""
    return make_checkpoint(folder, **options)


def load(folder: Path) -> Any:
    """Load a checkpoint in float32, with its generation config."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of_ids(model: Any, ids: list[int]) -> Any:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def logits_of_rows(model: Any, rows: Any, ids: list[int]) -> Any:
    """Logits of [rows + ids] with the rows as input embeddings."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(ids))
        return model(inputs_embeds=torch.cat([rows, embedded])[None]).logits[0]
