"""Which tokens a suffix may hold, and which suffixes are tried next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dtt_plugin.attack.options import Budget
from dtt_plugin.errors import DttError

_DRAWN = 1.25
"""Suffixes that are drawn for one that is read: some do not come through the tokenizer."""


def usable_tokens(tokenizer: Any, n_rows: int) -> torch.Tensor:
    """Return the ids that may stand in a suffix, int64, ascending: printable ASCII, no added token.

    Added tokens are broken by the neutraliser, and ids past the tokenizer are no text, so neither could be sent.

    Args:
        tokenizer: of the arm.
        n_rows: of the embedding matrix.

    Raises:
        DttError: there is none.
    """
    n = min(len(tokenizer), n_rows)
    barred = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    texts = tokenizer.batch_decode([[i] for i in range(n)], clean_up_tokenization_spaces=False)
    usable = [i for i, text in enumerate(texts) if i not in barred and text and text.isascii() and text.isprintable()]
    if not usable:
        raise DttError("The tokenizer has no token of printable ASCII text, so no suffix can be made of it.")
    return torch.tensor(usable)


def draw(
    suffix: Sequence[int],
    usable: torch.Tensor,
    budget: Budget,
    generator: torch.Generator,
    slope: torch.Tensor | None,
) -> list[list[int]]:
    """Return different suffixes that differ from the given one in one token.

    Args:
        suffix: the current one.
        usable: from `usable_tokens`.
        budget: how many, and of how many tokens a place.
        generator: draws places and tokens.
        slope: (suffix, V), the change of loss that a token promises; the best `top_k` of each place are drawn from
            (GCG, arXiv 2307.15043). None: all tokens alike.
    """
    n = int(_DRAWN * budget.candidates)
    places = torch.randint(len(suffix), (n,), generator=generator)
    if slope is None:
        tokens = usable[torch.randint(len(usable), (n,), generator=generator)]
    else:
        best = slope[:, usable.to(slope.device)].topk(min(budget.top_k, len(usable)), dim=1, largest=False).indices
        ranks = torch.randint(best.shape[1], (n,), generator=generator)
        tokens = usable[best.cpu()[places, ranks]]
    drawn: dict[tuple[int, ...], None] = {}
    for place, token in zip(places.tolist(), tokens.tolist(), strict=True):
        changed = (*suffix[:place], token, *suffix[place + 1 :])
        if changed != tuple(suffix):
            drawn[changed] = None
    return [list(changed) for changed in drawn]
