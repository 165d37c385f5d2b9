"""A program: loads a tiny model by vLLM's own loader, without an engine, and prints what its layers do, as JSON.

Arguments: the model's folder, its dtype, token files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch


def main(model: str, dtype: str, *files: str) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from dtt_plugin.serving.placing import TokenFile, place

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker on a processor has it
    placement = place(model, [TokenFile(file) for file in files]) if files else None
    dtt = {"dtt": {**placement.to_config(), "plain": "unchecked"}} if placement else {}
    config = EngineArgs(
        model, dtype=dtype, max_model_len=256, enforce_eager=True, load_format="safetensors", additional_config=dtt
    ).create_engine_config()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel(1, 1)
        loaded = get_model(vllm_config=config)
        size = loaded.model.embed_tokens.num_embeddings
        ids = torch.arange(size)
        hidden = torch.ones(3, loaded.config.hidden_size, dtype=getattr(torch, dtype))
        return {
            "ids": placement.ids if placement else [],
            "embedded": loaded.embed_input_ids(ids).float().tolist(),
            "columns": loaded.embed_input_ids(ids.view(1, -1)).shape,
            "never": [i for i in range(size) if loaded.compute_logits(hidden)[0, i] == float("-inf")],
            "dtype": str(loaded.embed_input_ids(ids).dtype),
        }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
