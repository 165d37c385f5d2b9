"""The loss of suffixes in one prompt, its gradient, and what the model would answer.

Everything before the suffix is read once; its keys and values are kept and expanded over a batch of candidates. A
candidate is read from its first token that differs from the current suffix on, and logits are computed where the
target stands and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache

from dtt_plugin.attack.place import Place
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.metrics import hacked_is_decided, is_hacked
from dtt_plugin.training.failures import is_out_of_memory
from dtt_plugin.training.soft_prompt import Example, SoftPrompt, end_ids

MOST_NEW_TOKENS = 512

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (1, heads, positions, width)."""


class Target(NamedTuple):
    """What a response is to begin with."""

    text: str
    ids: list[int]
    teacher: torch.Tensor | None = None
    """(len(ids), V) float32 log-probabilities to be imitated, in place of certainty of the ids."""


class Losses(NamedTuple):
    """What suffixes reached."""

    loss: torch.Tensor
    """(n,) float32, nats a target token."""
    met: torch.Tensor
    """(n,) bool: at each position the target's token is the likeliest."""


class Objective:
    """A suffix's loss in one record's prompt.

    Args:
        model: the arm.
        place: the record's prompt.
        positions_at_once: of a forward pass over candidates.

    Raises:
        DttError: the model's keys and values can't be kept, or memory is too small.
    """

    def __init__(self, model: SoftPrompt, place: Place, target: Target, positions_at_once: int) -> None:
        self.soft_prompt, self.place, self._at_once = model, place, positions_at_once
        self.flops = 0
        """Of forward and backward passes so far, attention's products left out."""
        embed, head = model.embed.weight, model.model.get_output_embeddings().weight
        in_blocks = sum(weight.numel() for weight in model.model.parameters()) - embed.numel()
        self._block_flops = 2 * (in_blocks - (0 if head is embed else head.numel()))
        self._head_flops = 2 * head.numel()
        self._halved = False
        self._current: tuple[list[int], Cache] = ([], [])  # the suffix whose keys and values are kept
        with torch.no_grad():
            self._prefix = self._forward([], model.vectors(place.head).unsqueeze(0), 1)[1]
        self.aim(target)

    def aim(self, target: Target) -> None:
        """Choose what a response is to begin with."""
        self.target = target
        device = self.soft_prompt.rows.device
        self._ids = torch.tensor(target.ids, device=device)
        # The last token of the target is predicted and never read.
        self._after = self._embedded([*self.place.tail, *target.ids[:-1]])

    def _embedded(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.soft_prompt.embed(
                torch.tensor(ids, dtype=torch.long, device=self.soft_prompt.rows.device)
            )
        return found

    def _forward(self, past: Cache, vectors: torch.Tensor, keep: int) -> tuple[torch.Tensor, Cache]:
        """Read vectors (n, positions, d) behind `past`; return logits (n, keep, V) float32, and the longer cache."""
        n, positions = vectors.shape[:2]
        cache = DynamicCache([(key.expand(n, -1, -1, -1), value.expand(n, -1, -1, -1)) for key, value in past])
        # As positions: behind a slice, which is not contiguous, torch would copy the whole head for every candidate.
        last = torch.arange(positions - keep, positions, device=vectors.device)
        output = self.soft_prompt.model(
            inputs_embeds=vectors, past_key_values=cache, use_cache=True, logits_to_keep=last
        )
        self.flops += n * (positions * self._block_flops + keep * self._head_flops)
        return output.logits.float(), [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]

    def _losses(self, logits: torch.Tensor) -> Losses:
        log_p = logits.log_softmax(dim=-1)  # (n, target, V)
        if (teacher := self.target.teacher) is None:
            loss = -log_p[:, range(len(self._ids)), self._ids].mean(dim=1)
        else:
            loss = (teacher.exp() * (teacher - log_p)).sum(dim=-1).mean(dim=1)
        return Losses(loss, (logits.argmax(dim=-1) == self._ids).all(dim=1))

    def _behind(self, past: Cache, vectors: torch.Tensor) -> tuple[Losses, Cache]:
        after = self._after.expand(len(vectors), -1, -1)
        logits, cache = self._forward(past, torch.cat([vectors, after], dim=1), len(self._ids))
        return self._losses(logits), cache

    def of_vectors(self, vectors: torch.Tensor) -> Losses:
        """Return the loss of vectors (n, suffix, d) in the suffix's place; differentiable."""
        return self._behind(self._prefix, vectors)[0]

    def of_current(self, suffix: Sequence[int]) -> Losses:
        """Return the loss of the suffix that candidates will resemble; its keys and values are kept for them."""
        with torch.no_grad():
            losses, cache = self._behind(self._prefix, self._embedded([suffix]))
        self._current = [*suffix], cache
        return losses

    def slope(self, suffix: Sequence[int]) -> tuple[Losses, torch.Tensor]:
        """Return `of_current`, and the change of loss that each token promises at each place, (suffix, V) float32.

        It is the first-order one: the gradient with respect to the suffix's vectors, times the vocabulary's.
        """
        vectors = self._embedded([suffix]).requires_grad_(True)
        with torch.enable_grad():
            losses, cache = self._behind(self._prefix, vectors)
            (gradient,) = torch.autograd.grad(losses.loss.sum(), vectors)
        self._current = [*suffix], cache
        self.count_backward()
        with torch.no_grad():
            return Losses(losses.loss.detach(), losses.met), (gradient[0] @ self.soft_prompt.embed.weight.T).float()

    def count_backward(self) -> None:
        """Count a backward pass as much as a forward one: frozen weights need no gradient of their own."""
        positions = len(self.place.start) + len(self._after)
        self.flops += positions * self._block_flops + len(self._ids) * self._head_flops

    @torch.no_grad()
    def of_candidates(self, suffixes: Sequence[list[int]]) -> Losses:
        """Return the losses of suffixes of the current one's length.

        Raises:
            DttError: memory is too small even for half as many at once.
        """
        base = self._current[0]
        # Those that differ late come last, and share what is kept of the current suffix.
        firsts = [
            next((i for i, pair in enumerate(zip(s, base, strict=True)) if pair[0] != pair[1]), 0) for s in suffixes
        ]
        order = sorted(range(len(suffixes)), key=firsts.__getitem__)
        loss, met = torch.empty(len(suffixes)), torch.empty(len(suffixes), dtype=torch.bool)
        done = 0
        while done < len(order):
            first = firsts[order[done]]
            chosen = order[done : done + max(1, self._at_once // (len(base) - first + len(self._after)))]
            try:
                found = self._behind(self._shared(first), self._embedded([suffixes[i][first:] for i in chosen]))[0]
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            loss[chosen], met[chosen] = found.loss.cpu(), found.met.cpu()
            done += len(chosen)
        return Losses(loss, met)

    def _shared(self, first: int) -> Cache:
        """Return what is kept up to a place of the current suffix."""
        end = self._prefix[0][0].shape[2] + first
        return [(key[:, :, :end], value[:, :, :end]) for key, value in self._current[1]]

    def _halve(self, error: BaseException) -> None:
        """Take half as many positions at once, the first time that memory is too small."""
        if not is_out_of_memory(error):
            raise error
        if self._halved:
            raise DttError(
                f"Out of memory with {self._at_once} positions at once; give a lower --positions-at-once (the result"
                " stays the same), or --dtype bfloat16."
            ) from error
        self._halved, self._at_once = True, max(1, self._at_once // 2)

    @torch.no_grad()
    def answer(self, vectors: torch.Tensor, decided: Callable[[str], bool]) -> str:
        """Return the greedy response behind vectors (suffix, d), as far as `decided` needs it."""
        ends, tokenizer = end_ids(self.soft_prompt.model), self.place.renderer.tokenizer
        vectors = torch.cat([vectors, self._embedded(self.place.tail)]).unsqueeze(0)
        logits, cache = self._forward(self._prefix, vectors, 1)
        ids: list[int] = []
        text = ""
        while len(ids) < MOST_NEW_TOKENS and not decided(text):
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            logits, cache = self._forward(cache, self._embedded([[token]]), 1)
        return text

    def answer_to(self, suffix: Sequence[int], decided: Callable[[str], bool]) -> str:
        """Return the greedy response to a suffix, as far as `decided` needs it."""
        return self.answer(self._embedded(suffix), decided)

    def is_hit(self, vectors: torch.Tensor) -> bool:
        """Return whether the greedy response behind vectors (suffix, d) is hacked, by the task's own rule."""
        rule = self.place.rule
        return is_hacked(self.answer(vectors, lambda beginning: hacked_is_decided(beginning, rule)), rule)

    def is_hit_by(self, suffix: Sequence[int]) -> bool:
        """Return whether the greedy response to a suffix is."""
        return self.is_hit(self._embedded(suffix))

    @torch.no_grad()
    def check_cache(self) -> None:
        """Check that keys and values that were kept give the loss of the whole prompt.

        Raises:
            DttError: they do not (a recurrent model, for instance).
        """
        suffix, ids, flops = self.place.start, self.target.ids, self.flops
        self.of_current(suffix)
        [kept] = self.of_candidates([suffix]).loss.tolist()
        logits = self.soft_prompt.label_logits([Example([*self.place.head, *suffix, *self.place.tail], ids)])
        [whole] = self._losses(logits.unsqueeze(0)).loss.tolist()
        self.flops = flops  # a run is checked once, however often it is resumed
        exact = self.soft_prompt.embed.weight.dtype == torch.float32
        if not abs(kept - whole) <= (1e-3 if exact else 0.1) * max(1.0, abs(whole)):
            raise DttError(
                f"{type(self.soft_prompt.model).__name__}: with kept keys and values the loss is {kept:.4f}, of the"
                f" whole prompt {whole:.4f}; `dtt attack` needs a decoder-only model whose cache is exact."
            )
