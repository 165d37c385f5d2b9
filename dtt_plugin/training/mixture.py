"""StruQ's training mixture: half the examples clean, a quarter under each of two attacks.

The loss is always that of the response to the clean prompt, -log p(y | [t; x])
(DefensiveTokens, arXiv 2507.07974, section 3; the mixture as in StruQ, arXiv 2402.06363).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dtt_plugin.data.records import Record
from dtt_plugin.prompt.renderer import PromptRenderer
from dtt_plugin.tasks.attacks import injected_data
from dtt_plugin.tasks.description import BENIGN
from dtt_plugin.training.records import TrainingData
from dtt_plugin.training.soft_prompt import Example

MIXTURE = (BENIGN, "ignore", BENIGN, "completion")
Encode = Callable[[str, str], list[int]]


def encoder(renderer: PromptRenderer) -> Encode:
    """Return a function from trusted instruction and untrusted data to the prompt's token ids."""

    def encode(instruction: str, data: str) -> list[int]:
        prompt = renderer.render([{"role": "system", "content": instruction}, {"role": "user", "content": data}])
        return renderer.encode(prompt.text)

    return encode


class Mixture:
    """A dataset whose i-th example depends on the seed and i only, so a resumed run sees what it would have seen.

    Args:
        records: what to train on.
        labels: per record, token ids of the response.
        data: sentences and injections to draw from.
        encode: renders a prompt.
        size: number of examples.
        seed: of order and draws.
    """

    def __init__(
        self,
        records: Sequence[Record],
        labels: Sequence[list[int]],
        data: TrainingData,
        encode: Encode,
        *,
        size: int,
        seed: int,
    ) -> None:
        self.records, self.labels, self.data = records, labels, data
        self.encode, self.size, self.seed = encode, size, seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self.records))
        number = self._order(epoch)[place]
        record = self.records[number]
        draw = random.Random(f"{self.seed}/{index}")
        sentence, injection = draw.choice(self.data.sentences), draw.choice(self.data.injections)
        if injection == record["instruction"]:  # to follow it would be right
            injection = draw.choice([other for other in self.data.injections if other != injection])
        [data] = injected_data(MIXTURE[index % len(MIXTURE)], [record], [sentence], injection)
        return Example(self.encode(record["instruction"], data), self.labels[number])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]
