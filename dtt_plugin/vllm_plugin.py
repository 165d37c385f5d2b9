"""What this package does inside vLLM: DefensiveTokens get the probability 0, and token files are served as they are.

vLLM loads the entry points of the group `vllm.general_plugins` in each of its processes, and calls `register`.

vLLM does not read `suppress_tokens` of generation_config.json. A defended
checkpoint's output rows keep its DefensiveTokens from ever being the likeliest
token, and below 1 / vocabulary at any temperature; sampled at temperature 2,
that is about one in ten thousand tokens. This makes it none: the logits layer
writes -inf for the ids that a checkpoint's config.json lists, and for those of
token files that are served beside a base model (`--additional-config
'{"dtt": {"tokens": [FILE, ...]}}'`, docs/serving.md). Other engines are not touched.

An engine's process also ends with the one that started it, which vLLM leaves to that one.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from dtt_plugin.checkpoint.defended import IDS_KEY
from dtt_plugin.errors import DttError

_ENGINE = "EngineCore"  # how vLLM calls the processes of its engines


def register() -> None:
    """Wrap vLLM's logits layer, replace its embedding layer and wrap its front end; twice is once."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.v1.engine.core import EngineCore

    from dtt_plugin.serving.hooks import problem
    from dtt_plugin.serving.layer import check_built, replace_layer, served
    from dtt_plugin.serving.requests import wrap_front_end

    if hasattr(LogitsProcessor, "dtt_ranges"):
        return
    LogitsProcessor.dtt_ranges = ()
    make, compute, start = LogitsProcessor.__init__, LogitsProcessor.forward, EngineCore.__init__
    end_with_parent()
    obstacle = problem()
    try:
        if obstacle is None:
            replace_layer()
            wrap_front_end()
    except DttError as error:
        obstacle = str(error)

    @functools.wraps(make)
    def make_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        config = get_current_vllm_config()
        ids = list(getattr(getattr(config.model_config, "hf_config", None), IDS_KEY, None) or ())
        if (files := served(config)) is not None:
            if obstacle is not None:
                raise DttError(obstacle)
            check_built(files)
            ids += [token_id for file in files["placed"] for token_id in file["ids"]]
        self.dtt_ranges = ranges(ids)
        if config.lora_config is not None and (qwen2 := sys.modules.get("vllm.model_executor.models.qwen2")):
            # Before the adapters are loaded: this class alone of the common ones takes none of its embedding.
            qwen2.Qwen2ForCausalLM.embedding_modules = {"embed_tokens": "input_embeddings"}

    @functools.wraps(compute)
    def compute_without(self: Any, lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        logits = compute(self, lm_head, *args, **kwargs)
        skip_gather = kwargs.get("skip_gather", len(args) > 2 and args[2])
        # A part of a split vocabulary has numbers of its own; the whole one comes through here as well.
        if logits is not None and not (skip_gather and getattr(lm_head, "tp_size", 1) > 1):
            for start, stop in self.dtt_ranges:
                logits[..., start:stop] = float("-inf")
        return logits

    @functools.wraps(start)
    def start_and_watch(self: Any, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        start(self, *args, **kwargs)

    LogitsProcessor.__init__, LogitsProcessor.forward = make_and_note, compute_without
    EngineCore.__init__ = start_and_watch


def end_with_parent() -> None:
    """Have an engine's process end when the one that started it does: killed, that one can't see to it.

    Called twice, since a process that was forked has this module's changes already, and any other loads them only
    when it is an engine. The engine's own workers end with it, by vLLM's own means.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(_ENGINE):
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="dtt-parent", daemon=True).start()


def ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the ids as ranges (start, stop): a slice needs no index tensor on the device."""
    runs = itertools.groupby(enumerate(sorted(ids)), key=lambda item: item[1] - item[0])
    groups = [[token_id for _, token_id in run] for _, run in runs]
    return tuple((group[0], group[-1] + 1) for group in groups)
