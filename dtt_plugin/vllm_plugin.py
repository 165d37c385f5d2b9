"""Where this package is installed, vLLM gives DefensiveTokens the probability 0.

vLLM does not read `suppress_tokens` of generation_config.json. A defended
checkpoint's output rows keep its DefensiveTokens from ever being the likeliest
token, and below 1 / vocabulary at any temperature; sampled at temperature 2,
that is about one in ten thousand tokens. This makes it none: vLLM loads the
entry points of the group `vllm.general_plugins` in each of its processes, and
`register` has its logits layer write -inf for the ids that a checkpoint's
config.json lists. Other checkpoints list none and are not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

CONFIG_KEY = "defensive_token_ids"
"""In config.json of a defended checkpoint."""


def register() -> None:
    """Have vLLM's logits layer suppress what a defended checkpoint's config.json lists; twice is once."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if hasattr(LogitsProcessor, "dtt_ranges"):
        return
    LogitsProcessor.dtt_ranges = ()
    make, compute = LogitsProcessor.__init__, LogitsProcessor.forward

    def make_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        model_config = get_current_vllm_config().model_config
        ids = getattr(model_config.hf_config, CONFIG_KEY, None) if model_config is not None else None
        self.dtt_ranges = ranges(ids or ())

    def compute_without(self: Any, lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        logits = compute(self, lm_head, *args, **kwargs)
        skip_gather = kwargs.get("skip_gather", len(args) > 2 and args[2])
        # A part of a split vocabulary has numbers of its own; the whole one comes through here as well.
        if logits is not None and not (skip_gather and getattr(lm_head, "tp_size", 1) > 1):
            for start, stop in self.dtt_ranges:
                logits[..., start:stop] = float("-inf")
        return logits

    LogitsProcessor.__init__, LogitsProcessor.forward = make_and_note, compute_without


def ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the ids as ranges (start, stop): a slice needs no index tensor on the device."""
    runs = itertools.groupby(enumerate(sorted(ids)), key=lambda item: item[1] - item[0])
    groups = [[token_id for _, token_id in run] for _, run in runs]
    return tuple((group[0], group[-1] + 1) for group in groups)
