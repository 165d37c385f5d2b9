"""The undefended chat model that tokens are trained for."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.defenses import NONE, parse_defense
from dtt_plugin.prompt.formats import MODEL_FORMAT
from dtt_plugin.prompt.hf_tokenizer import hf_tokenizer
from dtt_plugin.prompt.renderer import PromptRenderer, has_defensive_tokens, missing_bos, model_template
from dtt_plugin.training.failures import is_out_of_memory
from dtt_plugin.training.mixture import Encode, encoder


class ChatModel(NamedTuple):
    """A model, and how its prompts are written."""

    tokenizer: Any
    model: Any
    renderer: PromptRenderer
    encode: Encode
    """From trusted instruction and untrusted data to the undefended prompt's token ids."""


def load_chat_model(
    name: str, *, dtype: str = "auto", prompt_format: str = MODEL_FORMAT, today: datetime | None = None
) -> ChatModel:
    """Load a model and its prompt format; weights from safetensors only, no remote code.

    Args:
        name: folder or hub id.
        dtype: of the weights; auto: float32 on a processor, the checkpoint's own on a GPU.
        prompt_format: as in token files.
        today: what a template that writes the date takes for it, in place of the present.

    Raises:
        DttError: no causal language model, no chat template, one without a system role, or a defended model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    try:
        tokenizer = hf_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except Exception as error:  # tokenizers raises that very class for a damaged tokenizer.json
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DttError(f"{name} can't be loaded as a causal language model: {reason}") from error
    template = model_template(tokenizer)
    if not template:
        raise DttError(f"{name} has no chat template; DefensiveTokens are for chat models.")
    if has_defensive_tokens(tokenizer):
        raise DttError(f"{name} already has DefensiveTokens; give the undefended checkpoint.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    renderer = PromptRenderer(
        tokenizer,
        prompt_format=prompt_format,
        model_template=template,
        defenses=parse_defense(NONE),
        bos=missing_bos(tokenizer, template, prompt_format),
        template_args={"strftime_now": today.strftime} if today else None,
    )
    encode = encoder(renderer)
    try:
        encode("Sum up.", "A text.")
    except DttError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise DttError(
            f"The chat template of {name} can't render a system role, the trusted instruction, beside a user role, the"
            f" untrusted data{reason}; dtt train needs a model whose template does."
        ) from error
    return ChatModel(tokenizer, model.to("cuda") if on_gpu else model, renderer, encode)
