"""Model arguments: a misspelt one must never run as something else."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dtt_plugin.errors import DttError

OURS = (
    "pretrained",
    "tokens",
    "tokens_model",
    "defense",
    "prompt_format",
    "untrusted_role",
    "lone_user",
    "early_decision",
    "baked",
)


def parameters_of(function: Any) -> set[str]:
    """Return the names of a callable's named parameters."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds} - {"self"}


def check_arguments(model: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse arguments that neither this plugin nor the engine knows.

    Raises:
        DttError: names the first unknown argument and the one that was probably meant.
    """
    every = sorted({*known, *OURS})
    for name in given:
        if name in every:
            continue
        near = difflib.get_close_matches(name, every, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "see docs/models.md for the arguments."
        raise DttError(f"--model {model} has no argument {name!r}; {hint}")


def as_bool(name: str, value: Any) -> bool:
    """Return a yes-or-no argument as a bool; lm-eval hands over `True`, "true" or 1.

    Raises:
        DttError: it is neither.
    """
    words: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False, "none": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise DttError(f"{name}={value!r} is neither true nor false.") from None


def model_name(pretrained: Any) -> str | None:
    """Return the folder or hub id that `pretrained=` names, if it is given.

    Raises:
        DttError: it is a loaded model: what its weights are, no fingerprint could tell.
    """
    if pretrained is None or isinstance(pretrained, (str, os.PathLike)):
        return None if pretrained is None else os.fspath(pretrained)
    raise DttError(
        f"pretrained= is a loaded {type(pretrained).__name__}, and the dtt_ models load theirs themselves; save it with"
        " save_pretrained and give the folder, or a hub id."
    )


def template_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables for the chat template; lm-eval's vLLM class keeps `enable_thinking` to itself."""
    variables = dict(given.get("chat_template_args") or {})
    if given.get("enable_thinking") is not None:
        variables["enable_thinking"] = given["enable_thinking"]
    return variables
