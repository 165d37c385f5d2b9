"""A tiny model that says "hacked" where its prompt holds enough of one character, and otherwise always "no".

Attention is uniform, so the last position sees the mean over all positions of one feature that only `^` has. With
a gain of 0 nobody can make it say anything else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tests.checkpoints import default_vocab_tokens, make_checkpoint

SIGN = "^"


def planted(folder: Path, *, gain: float = 120.0) -> str:
    """Write the model and return its folder."""
    words = [*default_vocab_tokens(), *("ha", "ck", "hack", "ed", "hacked", "no")]
    make_checkpoint(folder, vocab_tokens=words, tied=False, dtype="float32")
    path = folder / "model.safetensors"
    tensors = {name: np.zeros_like(value) for name, value in load_file(path).items()}
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    # Feature 0: the sign; 2: a constant; the others tell tokens apart, faintly.
    embedding[:, 3:] = 0.1 * np.random.default_rng(0).standard_normal(embedding[:, 3:].shape)
    embedding[:, 2] = 1.0
    embedding[ids[SIGN], 0] = 5.0
    for name, value in tensors.items():
        if "norm" in name:
            value[:] = 1.0
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1.0
    tensors["model.layers.0.self_attn.o_proj.weight"][1, 0] = gain
    head[ids["hacked"], 1] = 10.0
    head[ids["hacked"], 2] = 1.0  # so that this spelling is the likelier from the start
    head[ids["no"], 2] = 10.0
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096'))
    return str(folder)
