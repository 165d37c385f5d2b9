"""Tiny real checkpoints for tests: a llama that transformers loads, a tokenizer that tokenizers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, START, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DTYPES: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}


def default_vocab_tokens() -> list[str]:
    """Every byte, so that any text has a tokenization, and a few whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, "he", "ll", "hell", "hello", "Ġw", "or", "Ġwor", "ld", "Ġworld"]


def make_tokenizer(folder: Path, vocab_tokens: Sequence[str], special: Sequence[str]) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE, the special tokens last."""
    vocab = {token: row for row, token in enumerate(vocab_tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab_tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": BOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def make_checkpoint(
    folder: Path,
    *,
    vocab_tokens: Sequence[str] | None = None,
    width: int = 32,
    tied: bool = True,
    extra_rows: int = 0,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    special: Sequence[str] = SPECIAL_TOKENS,
    reserved: int = 0,
    embedding: NDArray[Any] | None = None,
) -> Path:
    """Write a two-layer llama checkpoint to `folder` and return the folder.

    Args:
        vocab_tokens: ordinary tokens in the spelling of byte-level BPE (`Ġ` is a space), row 0 onwards.
        width: hidden size, a multiple of 4.
        tied: the output head is the embedding; else a matrix of its own, `lm_head.weight`.
        extra_rows: rows of the embedding beyond the tokenizer's tokens (a padded vocabulary).
        dtype: of every tensor: bfloat16, float16, float32 or float64.
        shards: number of safetensors files; more than one comes with an index.
        seed: of the weights.
        special: special tokens, the rows after `vocab_tokens`.
        reserved: number of special tokens in front of these that nothing uses, `<|reserved_0|>` onwards.
        embedding: the input embedding, (rows, width); drawn with the seed where it is not given.
    """
    tokens = default_vocab_tokens() if vocab_tokens is None else list(vocab_tokens)
    tokenizer = make_tokenizer(folder, tokens, (*(f"<|reserved_{i}|>" for i in range(reserved)), *special))
    rows = tokenizer.get_vocab_size() + extra_rows
    generator = np.random.default_rng(seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    tensors = _weights(generator, rows=rows, width=width, tied=tied)
    if embedding is not None:
        tensors["model.embed_tokens.weight"] = embedding
    write_weights(folder, {name: np.asarray(value, DTYPES[dtype]) for name, value in tensors.items()}, shards=shards)
    return folder


def _weights(generator: np.random.Generator, *, rows: int, width: int, tied: bool) -> dict[str, NDArray[Any]]:
    def matrix(*shape: int) -> NDArray[Any]:
        values: NDArray[Any] = generator.standard_normal(shape) / np.sqrt(shape[-1])
        return values

    tensors = {"model.embed_tokens.weight": 0.5 * matrix(rows, width)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (width // 2, width)),
            ("self_attn.v_proj", (width // 2, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (2 * width, width)),
            ("mlp.up_proj", (2 * width, width)),
            ("mlp.down_proj", (width, 2 * width)),
        ):
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + 0.1 * matrix(width)
    tensors["model.norm.weight"] = 1 + 0.1 * matrix(width)
    if not tied:
        tensors["lm_head.weight"] = matrix(rows, width)
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, NDArray[Any]], *, shards: int = 1) -> None:
    """Write `tensors` to model.safetensors, or to `shards` files with an index."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=metadata)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def change_in_place(path: Path) -> None:
    """Change the file's last byte and put size and modification time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
