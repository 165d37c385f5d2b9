"""A model with the probe's prompts on it: what every set of tokens is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.state import state
from dtt_plugin.probe.measure import divergences, label_distributions, log_odds, scores
from dtt_plugin.probe.prompts import LABEL_TOKENS, N_RECORDS, probe_prompts
from dtt_plugin.probe.verdict import Effect, Figure, closed_share
from dtt_plugin.progress import Bar
from dtt_plugin.training.chat_model import load_chat_model
from dtt_plugin.training.labels import check_prompt, self_labels
from dtt_plugin.training.records import TrainingData
from dtt_plugin.training.soft_prompt import SoftPrompt

BASELINE = 5
"""Rounds of `N_RECORDS` prompts that the model without tokens costs; each set of tokens costs two more."""


class Bench:
    """The model, its prompts, and the undefended figures that everything is compared with.

    Args:
        model: folder or hub id of the undefended chat model.
        data: training records; the evaluation's are refused when they are loaded.
        prompt_format: of the tokens.
        dtype: of the weights; auto: float32 on a processor, the checkpoint's own elsewhere.
        rounds: how many rounds of prompts the caller is going to measure, for the bar.
        progress: show a bar on stderr.

    Raises:
        DttError: no chat model, too few records, or logits that are not finite.
    """

    def __init__(
        self, model: str, data: TrainingData, *, prompt_format: str, dtype: str, rounds: int, progress: bool
    ) -> None:
        self.name = model
        self.chat = load_chat_model(model, dtype=dtype, prompt_format=prompt_format)
        self.prompts = probe_prompts(data, self.chat.encode, self.chat.renderer.encode)
        self.width = int(self.chat.model.get_input_embeddings().weight.shape[1])
        self.undefended = SoftPrompt(self.chat.model, torch.empty(0, self.width))
        total = (BASELINE + rounds) * N_RECORDS
        self.bar = Bar(total=total, desc="probing", unit=" prompts", disable=not progress)

    def baseline(self) -> None:
        """Measure the model without tokens."""
        attacked, clean = self.prompts.attacked, self.prompts.clean
        unattacked = [one.clean for one in attacked]
        self.labels, self.clean_labels = self._answers()
        undefended = scores(self.undefended, [one.prompt for one in attacked], self.labels, self.bar.update)
        self.loss_undefended = Figure.of(undefended.loss)
        self.loss_unattacked = Figure.of(scores(self.undefended, unattacked, self.labels, self.bar.update).loss)
        self.injected = [one.injected for one in attacked]
        self.log_odds = log_odds(undefended.first, self.injected, self.labels)
        self.clean = label_distributions(self.undefended, clean, self.clean_labels, self.bar.update)

    def _answers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the model's own undisturbed answers to the attacked and to the clean records; `dtt train`'s cache."""
        check_prompt(self.chat.tokenizer, self.prompts.clean[0])
        attacked = [one.record for one in self.prompts.attacked]
        answers = self_labels(
            self.undefended,
            self.chat.encode,
            [*attacked, *self.prompts.clean_records],
            tokenizer=self.chat.tokenizer,
            new_tokens=LABEL_TOKENS,
            weights=str(state(str(open_checkpoint(self.name, need="all").folder))),
        )
        self.bar.update(len(answers))
        return answers[: len(attacked)], answers[len(attacked) :]

    def effect(self, rows: np.ndarray[Any, Any]) -> Effect:
        """Measure the model under tokens (k, d)."""
        model = self._under(rows)
        found = scores(model, [one.prompt for one in self.prompts.attacked], self.labels, self.bar.update)
        change = log_odds(found.first, self.injected, self.labels) - self.log_odds
        kl = divergences(model, self.clean, self.prompts.clean, self.clean_labels, self.bar.update)
        return Effect(Figure.of(found.loss), Figure.of(change), Figure.of(kl))

    def share(self, effect: Effect) -> float:
        """Return the share of the attack's effect that tokens take back."""
        return closed_share(self.loss_undefended.mean, effect.loss_attacked.mean, self.loss_unattacked.mean)

    def loss_under(self, rows: np.ndarray[Any, Any]) -> float:
        """Return the loss under attack with tokens (k, d) alone: half the cost of `effect`."""
        found = scores(self._under(rows), [one.prompt for one in self.prompts.attacked], self.labels, self.bar.update)
        return float(found.loss.mean())

    @property
    def attack_gap(self) -> float:
        """By how much the attack raises the loss of the undefended model, nats a token."""
        return self.loss_undefended.mean - self.loss_unattacked.mean

    def _under(self, rows: np.ndarray[Any, Any]) -> SoftPrompt:
        return SoftPrompt(self.chat.model, torch.from_numpy(rows.astype(np.float32)))
