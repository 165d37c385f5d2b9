"""What model families do with their output head, where config.json and the stored tensors don't say it.

The tests compare these names with the installed transformers and vLLM, and fail when they are out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TIED_BY_DEFAULT = _names(
    "aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip bloom "
    "camembert cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text cpmant ctrl data2vec-text "
    "diffusion_gemma electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe falcon falcon_mamba florence2 gemma gemma2 "
    "gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified "
    "gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese "
    "granite_swa hunyuan_vl jetmoe kosmos-2 kosmos-2.5 lfm2 lfm2_moe lfm2_vl mamba marian mbart megatron-bert "
    "minicpm3 modernbert-decoder mpt mvp openai-gpt opt paddleocr_vl paligemma pegasus plbart pp_chart2table "
    "prophetnet recurrent_gemma roberta roberta-prelayernorm roc_bert roformer shieldgemma2 smollm3 starcoder2 "
    "t5gemma2 trocr udop vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya"
)
"""Their head is the input embedding where config.json leaves `tie_word_embeddings` out (transformers 5.19)."""

ALWAYS_TIED = _names("cohere cohere2 cohere2_moe gemma2 gemma3n gemma3n_text lfm2 lfm2_moe zamba2")
"""vLLM 0.32 computes their output from the input embedding whatever the configuration and the files hold."""

_ALWAYS_TIED_CLASSES = _names(
    "CohereForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM Gemma2ForCausalLM Gemma3nForCausalLM "
    "Gemma3nForConditionalGeneration Lfm2ForCausalLM Lfm2MoeForCausalLM Zamba2ForCausalLM"
)

OTHER_HEAD = _names(
    "bert bert-generation big_bird biogpt blip blt camembert data2vec-text electra ernie git kosmos-2 megatron-bert "
    "modernbert-decoder roberta roberta-prelayernorm roc_bert roformer rwkv t5gemma2 trocr whisper xlm xlm-roberta "
    "xlm-roberta-xl xlnet xmod"
)
"""Their head has another name than lm_head or embed_out, so that a new one would not be found."""


_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where models of several kinds of data have their language model's configuration."""


def text_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and those of its language model inside, the innermost last."""
    inner = next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict)), None)
    return [config, *(text_configs(inner) if inner is not None else ())]


def families(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the `model_type` of a configuration and of every one in it (text_config ...)."""
    if isinstance(family := config.get("model_type"), str):
        yield family
    for value in config.values():
        if isinstance(value, Mapping):
            yield from families(value)


def always_tied(config: Mapping[str, Any]) -> str | None:
    """Return the family or class by which an engine ties head and embedding whatever a flag says; None for none."""
    names = [*families(config), *_classes(config)]
    return next((name for name in names if name in ALWAYS_TIED | _ALWAYS_TIED_CLASSES), None)


def _classes(config: Mapping[str, Any]) -> Iterator[str]:
    listed = config.get("architectures")
    yield from (name for name in (listed if isinstance(listed, list) else ()) if isinstance(name, str))
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _classes(value)
