"""What the tests of baking share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.tokens.files import DefensiveTokens
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
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():  # float32 files are mapped, and BLAS may pick kernels by an address
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return model


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


def assert_same_logits(
    model: Any, base: Any, n_rows: int, given: dict[str, Any], base_given: dict[str, Any] | None = None
) -> None:
    """Assert that two models compute the same logits of the first `n_rows` tokens, as exactly as that can be said.

    Final hidden states and head rows are the same bits. The logits need not be: for a head with more rows BLAS may
    take another kernel, which sums the n products of a logit in another order. Whatever the order, the sum lies
    within g = n u / (1 - n u) times the sum of the products' magnitudes of the exact one, u = 2**-24 (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1); two of them lie within twice that of each other.
    """
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        hidden, base_hidden = (
            one.base_model(**inputs).last_hidden_state for one, inputs in ((model, given), (base, base_given or given))
        )
        logits, base_logits = model(**given).logits, base(**(base_given or given)).logits
    head, base_head = (one.get_output_embeddings().weight[:n_rows] for one in (model, base))
    assert torch.equal(hidden, base_hidden)
    assert torch.equal(head, base_head)
    n_products, u = head.shape[1], 2.0**-24
    bound = 2 * n_products * u / (1 - n_products * u) * (hidden.double().abs() @ head.double().abs().T)
    assert ((logits[..., :n_rows].double() - base_logits[..., :n_rows].double()).abs() <= bound).all()
