"""DefensiveTokens as a LoRA adapter of the input embedding, for servers that load adapters.

A one-hot matrix A picks the tokens' ids out of the vocabulary, and B holds what their rows have more than the base
model's: rank k, scale 1. Such an adapter is a PEFT folder, served by stock vLLM (`--lora-target-modules embed_tokens`).
In low precision E + (T - E) rounds twice, where a baked checkpoint and `dtt serve` have T rounded once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dtt_plugin.bake.check_tokenizer import check_tokenizer
from dtt_plugin.bake.template import defended_templates
from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.tensors import write_safetensors
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import write_json
from dtt_plugin.files.staging import staged
from dtt_plugin.prompt.formats import check_format, defensive_token_names
from dtt_plugin.public_names import public_name
from dtt_plugin.serving.placing import TokenFile, place, stored_rows
from dtt_plugin.tokens.peft import CONFIG_FILE, WEIGHTS_FILE

TAKE_EMBEDDINGS = frozenset(
    [
        "CohereForCausalLM",
        "ExaoneForCausalLM",
        "Exaone4ForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]
)
"""Classes of vLLM that take a LoRA of their embedding: Qwen2's with our vLLM plugin, the others by themselves."""


def write_lora(
    source: TokenFile, folder: Path, *, model: str, revision: str | None = None, prompt_format: str | None = None
) -> list[int]:
    """Write the adapter folder, with tokenizer and chat template; it appears complete, or not at all.

    Args:
        source: the tokens.
        folder: to be made.
        model: the base model, whose embedding is read at k rows.
        revision: of a hub id.
        prompt_format: by default the tokens'.

    Returns:
        The ids of the tokens.

    Raises:
        NoFreeIds: the model's vocabulary is full.
        DttError: its class takes no such adapter, the tokens don't fit, or the folder exists.
    """
    checkpoint = open_checkpoint(model, revision=revision, need="embeddings")
    classes = [str(name) for name in checkpoint.config().get("architectures") or ["unknown"]]
    if not TAKE_EMBEDDINGS.intersection(classes):
        raise DttError(
            f"{checkpoint.name} is a {classes[0]}, whose class in vLLM takes no LoRA of its embedding; use `dtt "
            "serve`, or bake the tokens."
        )
    placement = place(model, [source], revision=revision)
    (placed,) = placement.placed
    embedding = checkpoint.input_embedding()
    own = np.concatenate([embedding.read_rows(i, i + 1) for i in placed.ids]).astype(np.float32)
    k, width = placed.tokens.k, placed.tokens.width
    pick = np.zeros((k, embedding.shape[0]), np.float32)
    pick[np.arange(k), list(placed.ids)] = 1
    more = np.ascontiguousarray((stored_rows(placed.tokens, placement.stored) - own).T)
    layer = embedding.name.removesuffix(".weight")
    tokenizer = TokenizerFiles(checkpoint.folder)
    templates = defended_templates(
        tokenizer,
        check_format(prompt_format or placed.tokens.prompt_format),
        k=k,
        default_on=True,
        system_in_user=False,
    )
    names = tuple(defensive_token_names(k))
    with staged(folder) as temporary:
        tokenizer.write_defended(temporary, names, placed.ids, templates, keep_bos=False)
        check_tokenizer(tokenizer, temporary, names=names, token_ids=placed.ids, templates=templates, keep_bos=False)
        tensors = {
            f"base_model.model.{layer}.lora_embedding_A": pick,
            f"base_model.model.{layer}.lora_embedding_B": more,
        }
        write_safetensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt", "sha256": placed.tokens.digest})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": public_name(model),
            "inference_mode": True,
            "r": k,
            "lora_alpha": k,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [layer.rpartition(".")[2]],
        }
        write_json(temporary / CONFIG_FILE, config)
    assert more.shape == (width, k)
    return list(placed.ids)
