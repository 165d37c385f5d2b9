"""Synthetic checkpoints: two that look like related models to an alignment, and a random model that can chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.rotations import mixing_rotation
from dtt_plugin.checkpoint.tensors import safetensors_header

EMBEDDING = "model.embed_tokens.weight"
ROW_NORM = 0.65  # of Llama-3's vocabulary
_BLOCK = 8192


def write_pair(folder: Path, rows: int, width: int, *, relative_residual: float = 0.3, seed: int = 0) -> list[Path]:
    """Write two bfloat16 checkpoints, `source` and `target`, of `rows` x `width` and return their folders.

    The source's covariance has eigenvalues that fall as 1 / i, turned by a random rotation. The target is the
    source turned by another rotation, plus noise of the same spectrum: the best map leaves `relative_residual`.
    """
    folders = [folder / "source", folder / "target"]
    for path in folders:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
        vocab = {f"t{row}": row for row in range(rows)}
        tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "decoder": {"type": "ByteLevel"}}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    files = [(path / "model.safetensors").open("wb") for path in folders]
    for file in files:
        file.write(safetensors_header([(EMBEDDING, "BF16", [rows, width], 2 * rows * width)]))
    generator = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(np.arange(1, width + 1))).astype(np.float32)
    spectrum *= ROW_NORM / np.linalg.norm(spectrum)
    # ||Y||^2 = ||X||^2 + ||noise||^2, and the residual is the noise.
    noise = relative_residual / np.sqrt(1 - relative_residual**2)
    for start in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        x = generator.standard_normal((count, width), dtype=np.float32) * spectrum
        e = generator.standard_normal((count, width), dtype=np.float32) * spectrum * noise
        _write(files[0], mixing_rotation(x, np.random.default_rng(1)))
        _write(files[1], mixing_rotation(x + e, np.random.default_rng(2)))
    for file in files:
        file.close()
    return folders


def _write(file: Any, block: NDArray[np.float32]) -> None:
    file.write(block.astype(ml_dtypes.bfloat16).tobytes())


class Shape(NamedTuple):
    """Of a llama."""

    rows: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int


BEGIN, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(folder: Path, shape: Shape, *, device: str, seed: int = 0) -> Path:
    """Write a random bfloat16 chat model, a shard a layer, and return its folder.

    Its tokenizer has a token for each byte, `shape.rows` with what stands for nothing: a prompt has as many tokens as
    bytes.

    Args:
        folder: to be made.
        shape: of the model; its head is a matrix of its own.
        device: where the numbers are drawn.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    _write_settings(folder, shape)
    generator = torch.Generator(device).manual_seed(seed)
    key_value_width = shape.width // shape.heads * shape.key_value_heads
    matrices = {
        "self_attn.q_proj": (shape.width, shape.width),
        "self_attn.k_proj": (key_value_width, shape.width),
        "self_attn.v_proj": (key_value_width, shape.width),
        "self_attn.o_proj": (shape.width, shape.width),
        "mlp.gate_proj": (shape.intermediate, shape.width),
        "mlp.up_proj": (shape.intermediate, shape.width),
        "mlp.down_proj": (shape.width, shape.intermediate),
    }
    shards: list[dict[str, tuple[int, ...]]] = [{EMBEDDING: (shape.rows, shape.width)}]
    for layer in range(shape.layers):
        names = {f"model.layers.{layer}.{name}.weight": size for name, size in matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shards.append(names | {f"model.layers.{layer}.{name}.weight": (shape.width,) for name in norms})
    shards.append({"model.norm.weight": (shape.width,), "lm_head.weight": (shape.rows, shape.width)})
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        tensors = {}
        for name, size in shard.items():
            tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
            if len(size) == 2:
                scale = ROW_NORM if name == EMBEDDING else 1
                tensor.normal_(0, scale / size[1] ** 0.5, generator=generator)
            tensors[name] = tensor.cpu()
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _write_settings(folder: Path, shape: Shape) -> None:
    """Write config and tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Byte 0, so no attack on the model tries them.
    nothing = [f"Ā{row}" for row in range(shape.rows - len(alphabet) - 2)]
    vocabulary = {token: row for row, token in enumerate([*alphabet, *nothing])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END, "pad_token": END, "chat_template": _TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.rows,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": shape.rows - 1,
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
