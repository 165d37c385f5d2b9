"""A tiny checkpoint as Mistral publishes them: Hugging Face's files, and Mistral's own beside them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

from tests.checkpoints import make_checkpoint

_SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]


def make_mistral(folder: Path, *, consolidated: bool = False, hugging_face_tokenizer: bool = True) -> str:
    """Write the checkpoint.

    Args:
        folder: where to.
        consolidated: with Mistral's own weights and settings, too, by which vLLM knows such a folder.
        hugging_face_tokenizer: with tokenizer.json.
    """
    make_checkpoint(folder, width=32, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 16}
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    vocab = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": chr(n)} for n in range(256)]
    special = [{"rank": n, "token_str": text, "is_control": True} for n, text in enumerate(_SPECIAL)]
    tekken = {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": vocab,
        "special_tokens": special,
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    if consolidated:
        shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
        params = {"dim": 32, "n_layers": 2, "head_dim": 16, "hidden_dim": 64, "n_heads": 2, "n_kv_heads": 1}
        (folder / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5, "vocab_size": 268}))
    if not hugging_face_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    return str(folder)
