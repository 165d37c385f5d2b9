"""Where the rows start: at random, from a text's embeddings, or from other tokens."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.training.options import TEXT_INIT, TrainingOptions

RANDOM = "random"


def start_tokens(options: TrainingOptions) -> Any:
    """Return the `DefensiveTokens` that --init names, or None where it names no file.

    Raises:
        DttError: no such file, or it has another k than --k.
    """
    if options.init == RANDOM or options.init.startswith(TEXT_INIT):
        return None
    from dtt_plugin.tokens.files import load_tokens

    if not os.path.exists(options.init):  # unlike Path's, False for a name that no file system takes
        raise DttError(f"--init {options.init}: no such token file; give random, {TEXT_INIT}..., or a file.")
    model = options.model if options.init.endswith(".json") else None
    tokens = load_tokens(options.init, model=model)
    if tokens.k != options.k:
        raise DttError(f"--init {options.init} holds {tokens.k} tokens and --k is {options.k}; give --k {tokens.k}.")
    return tokens


def start_rows(options: TrainingOptions, tokens: Any, embedding: Any, encode: Any) -> Any:
    """Return the start as rows of the embedding matrix, a float32 tensor [k, d].

    Args:
        options: `init`, `k` and `seed` count.
        tokens: from `start_tokens`.
        embedding: the model's input embedding module.
        encode: from text to token ids.

    Raises:
        DttError: another width than the model's, or a text with fewer than k tokens.
    """
    import torch

    width = embedding.weight.shape[1]
    if tokens is not None:
        tokens.check_width(width, name=f"--init {options.init}", model=options.model)
        return torch.from_numpy(tokens.rows.copy())
    if options.init == RANDOM:
        generator = torch.Generator().manual_seed(options.seed)
        return torch.randn(options.k, width, generator=generator)
    ids: Sequence[int] = encode(options.init.removeprefix(TEXT_INIT))
    if len(ids) < options.k:
        raise DttError(f"--init {options.init!r} is {len(ids)} tokens long and --k is {options.k}; give a longer text.")
    return embedding.weight[list(ids[: options.k])].detach().float().cpu()
