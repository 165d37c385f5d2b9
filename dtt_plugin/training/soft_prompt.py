"""A frozen chat model with k trainable rows in front of everything.

Sequences are packed one behind the other into a single row of positions, each
with position ids of its own, so no computation goes into padding; logits are
computed where a response token is predicted and nowhere else; gradients reach
the k x d rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import GenerationConfig

from dtt_plugin.arrays import Float, Float32
from dtt_plugin.errors import DttError

PACKING_TOLERANCE = 1e-4
_SCALE_TOLERANCE = 1e-2
# Positions of a batch when generating: a processor needs some 64 rows at once to be well used.
_GENERATED_AT_ONCE = 8192


class Example(NamedTuple):
    """Token ids of a rendered prompt (without DefensiveTokens) and of the response to learn."""

    prompt: list[int]
    response: list[int]


class SoftPrompt(nn.Module):
    """A causal language model under k rows.

    Args:
        model: a transformers causal language model; frozen here, its dropout taken out, its generation made greedy.
        rows: the start, float32 [k, d], as rows of the embedding matrix; k may be 0 (the undefended model).
    """

    def __init__(self, model: Any, rows: Float[torch.Tensor, "k d"]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        take_dropout_out(model)
        # Beams, penalties and suppressed tokens of the checkpoint's own would enter labels and held-out ASR.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        self.embed = model.get_input_embeddings()
        self.rows = nn.Parameter(rows.detach().clone().float().to(self.embed.weight.device))
        self.scale = embedding_scale(self.embed)
        self.packs = self._packs_exactly()

    def train(self, mode: bool = True) -> SoftPrompt:
        """Leave the frozen model in evaluation mode; transformers recomputes activations in training mode only."""
        super().train(mode)
        self.model.eval()
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the rows only: a checkpoint of a run needs no frozen weights."""
        return {"rows": self.rows.detach()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the rows of a run's checkpoint."""
        with torch.no_grad():
            self.rows.copy_(state_dict["rows"])
        return _IncompatibleKeys([], [])  # nothing is missing, which the HF Trainer asks

    @property
    def k(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def vectors(self, ids: Sequence[int]) -> Float[torch.Tensor, "k_and_n d"]:
        """Return what the model sees for [rows; ids]: (k + n, d), in the model's data type."""
        looked_up = self.embed(torch.tensor(ids, device=self.rows.device))  # (n, d)
        # The cast loses nothing in float32; in bfloat16 it is what a baked checkpoint stores.
        rows = self.rows.to(looked_up.dtype) * self.scale  # (k, d)
        return torch.cat([rows, looked_up])

    def logits(self, sequences: Sequence[Sequence[int]], at: Sequence[int]) -> Float32[torch.Tensor, "at vocabulary"]:
        """Return the logits (len(at), vocabulary) at positions `at` of the packed sequences, float32."""
        vectors = [self.vectors(ids) for ids in sequences]
        positions = torch.cat([torch.arange(len(vector), device=self.rows.device) for vector in vectors])
        output = self.model(
            inputs_embeds=torch.cat(vectors).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor(at, device=self.rows.device),
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def label_logits(self, examples: Sequence[Example]) -> Float32[torch.Tensor, "tokens vocabulary"]:
        """Return the logits that predict the response tokens, one example's behind the other's, float32.

        Their shape is (sum of the responses' lengths, vocabulary).
        """
        at: list[int] = []
        start = 0
        for example in examples:
            first = start + self.k + len(example.prompt) - 1  # the position that predicts the first response token
            at += range(first, first + len(example.response))
            start += self.k + len(example.prompt) + len(example.response)
        return self.logits([example.prompt + example.response for example in examples], at)

    def forward(self, examples: Sequence[Example]) -> Float32[torch.Tensor, ""]:
        """Return the sum over all response tokens of -log p(response | [rows; prompt]), a scalar in nats."""
        logits = self.label_logits(examples)
        targets = [token for example in examples for token in example.response]
        return F.cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="sum")

    def passes(self, examples: Sequence[Example], tokens_at_once: int) -> Iterator[list[Example]]:
        """Divide a batch into forward passes of at most `tokens_at_once` positions, an example at least."""
        part: list[Example] = []
        width = 0
        for example in examples:
            length = self.k + len(example.prompt) + len(example.response)
            if part and (width + length > tokens_at_once or not self.packs):
                yield part
                part, width = [], 0
            part.append(example)
            width += length
        if part:
            yield part

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, pad: int) -> list[list[int]]:
        """Return the greedy responses' ids, the end-of-turn token included where it was reached.

        Args:
            prompts: token ids, without the rows.
            new_tokens: the most tokens of a response.
            pad: id of the padding token.
        """
        training = self.training
        self.eval()  # in training mode with recomputed activations there is no cache of what came before
        try:
            return self._generate(prompts, new_tokens, pad)
        finally:
            self.train(training)

    def _generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, pad: int) -> list[list[int]]:
        ends = end_ids(self.model)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        responses: dict[int, list[int]] = {}
        while order:
            # The longest comes first and sets the width; the others of the batch are of similar length.
            size = max(1, _GENERATED_AT_ONCE // (self.k + len(prompts[order[0]]) + new_tokens))
            chosen, order = order[:size], order[size:]
            vectors = [self.vectors(prompts[i]) for i in chosen]
            width = max(map(len, vectors))
            embeds = torch.stack([F.pad(vector, (0, 0, width - len(vector), 0)) for vector in vectors])
            mask = torch.tensor([[0] * (width - len(v)) + [1] * len(v) for v in vectors], device=embeds.device)
            output = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            for i, ids in zip(chosen, output.tolist(), strict=True):
                end = next((n for n, token in enumerate(ids) if token in ends), None)
                responses[i] = ids if end is None else ids[: end + 1]
        return [responses[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _packs_exactly(self) -> bool:
        """Return whether a packed pair gives each sequence's own logits (not so for recurrent models)."""
        try:
            n = self.embed.weight.shape[0]
            first, second = [i % n for i in range(1, 9)], [i % n for i in range(11, 17)]
            alone = self.logits([second], [self.k + len(second) - 1])
            packed = self.logits([first, second], [2 * self.k + len(first) + len(second) - 1])
        except (TypeError, ValueError) as error:
            raise DttError(
                f"{type(self.model).__name__} takes no inputs_embeds with logits_to_keep ({error}); dtt train needs a"
                " decoder-only model of a recent transformers release."
            ) from error
        # bfloat16 rounds differently in a longer row; a leak between sequences moves logits far more than this.
        tolerance = PACKING_TOLERANCE if alone.dtype == self.embed.weight.dtype else 0.05
        return bool((alone - packed).abs().max() <= tolerance * alone.abs().max())


def take_dropout_out(model: Any) -> None:
    """Set every dropout rate of a model to zero: those of modules, of their attributes and of their configs."""
    owners = [owner for module in model.modules() for owner in (module, getattr(module, "config", None)) if owner]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            is_rate = "drop" in name or (name == "p" and "Dropout" in type(owner).__name__)
            if is_rate and isinstance(value, float):
                setattr(owner, name, 0.0)


@torch.no_grad()
def embedding_scale(embed: Any) -> float:
    """Return the factor between a row of the embedding matrix and what its look-up gives (1, except in Gemma 3).

    Raises:
        DttError: the look-up is more than a multiplication.
    """
    ids = torch.arange(min(64, embed.weight.shape[0]), device=embed.weight.device)
    rows, found = embed.weight[ids].double(), embed(ids).double()
    norm = rows.pow(2).sum()
    scale = float((rows * found).sum() / norm) if norm > 0 else 1.0
    if not torch.allclose(found, rows * scale, rtol=_SCALE_TOLERANCE, atol=float(_SCALE_TOLERANCE * found.abs().max())):
        raise DttError(f"{type(embed).__name__} changes a row by more than a factor; its tokens can't be trained.")
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def end_ids(model: Any) -> set[int]:
    """Return the ids that end the model's generations."""
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end} - {None}
