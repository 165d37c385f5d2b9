"""The probe's figures, by forward passes: loss under attack, log-odds of what is injected, KL on clean prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dtt_plugin.errors import DttError
from dtt_plugin.training.soft_prompt import Example, SoftPrompt

_POSITIONS_AT_ONCE = 512

Values = NDArray[np.float64]
"""One value a record, (n,)."""


class Scores(NamedTuple):
    """What the model says of labels, record by record."""

    loss: Values
    """-log p(label | [tokens; prompt]), mean over the label's tokens, nats; StruQ's loss."""
    first: list[torch.Tensor]
    """Log-probabilities (vocabulary,) at the first token of each response, float32."""


def scores(
    model: SoftPrompt, prompts: Sequence[list[int]], labels: Sequence[list[int]], advance: Callable[[int], object] = int
) -> Scores:
    """Return loss and first-token log-probabilities of `labels` behind `prompts`.

    Args:
        model: with k rows or none.
        prompts: token ids.
        labels: token ids, one response for each prompt.
        advance: is told how many prompts were read, after each forward pass.

    Raises:
        DttError: a logit is not finite.
    """
    losses: list[float] = []
    first: list[torch.Tensor] = []
    for label, log_p in _label_log_probabilities(model, prompts, labels, advance):
        losses.append(-float(log_p.gather(1, torch.tensor(label, device=log_p.device)[:, None]).mean()))
        first.append(log_p[0].clone())
    return Scores(np.array(losses), first)


def label_distributions(
    model: SoftPrompt, prompts: Sequence[list[int]], labels: Sequence[list[int]], advance: Callable[[int], object] = int
) -> list[torch.Tensor]:
    """Return per prompt the log-probabilities (len(label), vocabulary) at the label's positions, float32.

    They take n x label x vocabulary x 4 bytes: 155 MB for 32 labels of 8 tokens and 151,936 entries.
    """
    return [log_p.clone() for _, log_p in _label_log_probabilities(model, prompts, labels, advance)]


def divergences(
    model: SoftPrompt,
    undefended: Sequence[torch.Tensor],
    prompts: Sequence[list[int]],
    labels: Sequence[list[int]],
    advance: Callable[[int], object] = int,
) -> Values:
    """Return KL(undefended || model) at the label's positions, mean over its tokens, nats, (n,).

    Args:
        model: with tokens.
        undefended: from `label_distributions`.
        prompts: token ids.
        labels: token ids.
        advance: is told how many prompts were read.
    """
    found = _label_log_probabilities(model, prompts, labels, advance)
    pairs = zip(undefended, found, strict=True)
    return np.array([float((p.exp() * (p - q)).sum(dim=1).mean()) for p, (_, q) in pairs])


@torch.no_grad()
def _label_log_probabilities(
    model: SoftPrompt, prompts: Sequence[list[int]], labels: Sequence[list[int]], advance: Callable[[int], object]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield each label with the log-probabilities (len(label), vocabulary) at its positions, float32."""
    examples = [Example(prompt, label) for prompt, label in zip(prompts, labels, strict=True)]
    for part in model.passes(examples, _POSITIONS_AT_ONCE):
        logits = model.label_logits(part)
        if not torch.isfinite(logits).all():
            raise DttError("The model's logits are not finite under these tokens; check the token file and --dtype.")
        log_p = logits.log_softmax(dim=1)
        start = 0
        for example in part:
            yield example.response, log_p[start : start + len(example.response)]
            start += len(example.response)
        advance(len(part))


def log_odds(first: Sequence[torch.Tensor], injected: Sequence[int], labels: Sequence[list[int]]) -> Values:
    """Return log p(injected first token) - log p(label's first token) of each record, nats, (n,)."""
    rows = zip(first, injected, labels, strict=True)
    return np.array([float(log_p[word] - log_p[label[0]]) for log_p, word, label in rows])
