"""DefensiveTokens as a prompt-tuning adapter of PEFT, which has the same vectors in front of the same prompt.

An adapter is a folder: adapter_config.json says the kind and the base model, and adapter_model.safetensors
holds the k vectors as `prompt_embeddings` [k, d]. What PEFT has no field for (method, prompt format,
licence ...) stands in the metadata of the latter, which PEFT doesn't read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.arrays import Float32
from dtt_plugin.checkpoint.folder import read_json_table
from dtt_plugin.checkpoint.tensors import TensorLocation, read_header, write_safetensors
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import write_json
from dtt_plugin.files.staging import staged

CONFIG_FILE, WEIGHTS_FILE, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def read_adapter(folder: Path) -> tuple[TensorLocation, str, dict[str, str]]:
    """Find the tokens of the adapter in `folder`.

    Returns:
        Where the rows lie, [k, d]; the base model; and the metadata beside them.

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
    return tensors[TENSOR], str(config.get("base_model_name_or_path") or ""), metadata


def write_adapter(
    folder: Path, rows: Float32[NDArray[np.float32], "k d"], model: str, metadata: Mapping[str, str]
) -> None:
    """Write the adapter folder: `rows` [k, d] for the base model `model`. It appears complete, or not at all.

    Raises:
        DttError: the folder exists, or a file can't be written.
    """
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    with staged(folder) as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, {TENSOR: rows}, {**metadata, "format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
