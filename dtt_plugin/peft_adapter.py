"""DefensiveTokens as a prompt-tuning adapter of PEFT, which has the same vectors in front of the same prompt.

An adapter is a folder: adapter_config.json says the kind and the base model, and adapter_model.safetensors
holds the k vectors as `prompt_embeddings` [k, d]. What PEFT has no field for (method, prompt format) stands
in the metadata of the latter, which PEFT doesn't read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint_folder import read_json_table
from dtt_plugin.errors import DttError
from dtt_plugin.files import write_json
from dtt_plugin.formats import MODEL_FORMAT
from dtt_plugin.staging import staged
from dtt_plugin.tensor_files import read_header, write_safetensors

CONFIG_FILE, WEIGHTS_FILE, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_FIELDS = ("method", "source_model", "prompt_format")


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read the adapter in `folder`.

    Returns:
        The fields of `DefensiveTokens`: rows [k, d] in float32, the base model as `model`, and the rest.

    Raises:
        DttError: not a prompt-tuning adapter in safetensors, or one of several submodules.
    """
    config = read_json_table(folder / CONFIG_FILE, missing={})
    if config.get("peft_type") != "PROMPT_TUNING":
        found = f"peft_type={config['peft_type']!r}" if "peft_type" in config else f"no {CONFIG_FILE} with a peft_type"
        raise DttError(
            f"{folder} is not a prompt-tuning adapter of PEFT ({found}); give a token file or such a folder."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise DttError(f"{folder} has no {WEIGHTS_FILE}; save the adapter with safe_serialization=True.")
    tensors, metadata = read_header(folder / WEIGHTS_FILE)
    if TENSOR not in tensors or (config.get("num_transformer_submodules") or 1) != 1:
        raise DttError(f"{folder} holds no {TENSOR} of a decoder-only model; only such an adapter can be converted.")
    fields = {name: metadata[name] for name in _FIELDS if name in metadata}
    return {
        "rows": tensors[TENSOR].read().astype("float32"),
        "model": str(config.get("base_model_name_or_path") or ""),
        "method": "trained",
        "prompt_format": MODEL_FORMAT,
        **fields,
    }


def write_adapter(folder: Path, fields: dict[str, Any]) -> None:
    """Write the adapter folder from the same fields; it appears complete, or not at all.

    Raises:
        DttError: the folder exists, or a file can't be written.
    """
    rows = fields["rows"]
    metadata = {"format": "pt", **{name: fields[name] for name in _FIELDS}}
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": fields["model"],
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    with staged(folder) as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, {TENSOR: rows}, metadata)
        write_json(temporary / CONFIG_FILE, config)
