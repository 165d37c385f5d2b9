"""Turned twins: the same function in another hidden space, to test transfers against a known answer.

Row vectors; R is orthogonal, [d, d]. Every RMSNorm's gains are folded into the
linear layers behind it (then x / rms(x) commutes with R), the output head
becomes a matrix of its own, and the hidden space is turned:

    embedding  E -> E R        a layer that reads the hidden space, y = x W^T:   W -> W R
    norms      g -> 1          a layer that writes it, x += z W^T (+ b):         W -> R^T W, b -> b R

so the twin's hidden states are those of the original times R, its logits and
answers the same up to rounding, and DefensiveTokens T of the original are T R
on the twin: what a transfer has to find, and plain copies do not give.

For the llama and qwen2 architectures; the folding is the one of SliceGPT
(arXiv 2401.15024, section 3).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dtt_plugin.arrays import Float32, Float64
from dtt_plugin.checkpoint.opening import Checkpoint, TensorLocation, open_checkpoint
from dtt_plugin.checkpoint.tensors import safetensors_header
from dtt_plugin.errors import DttError
from dtt_plugin.files.staging import staged
from dtt_plugin.progress import Bar
from dtt_plugin.tokens.files import DefensiveTokens
from dtt_plugin.tokens.licence import inherited, origin_of

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
_DTYPES: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
# Layers that read the hidden space, with the norm in front of each, and layers that write it.
_READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_LAYER = re.compile(r"^(model\.layers\.\d+\.)(.+)\.(weight|bias)$")
_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_CARRIED = (".json", ".txt", ".model", ".jinja")


def turn_tokens(
    tokens: DefensiveTokens, rotation: Float64[NDArray[np.float64], "d d"], *, model: str
) -> DefensiveTokens:
    """Return `tokens` (k, d) in the twin's space: rows times `rotation` (d, d)."""
    rows = (tokens.rows.astype(np.float64) @ rotation).astype(np.float32)  # (k, d)
    metadata = tokens.metadata | inherited(tokens)
    return replace(tokens, rows=rows, model=model, source_model=origin_of(tokens), metadata=metadata)


def write_twin(model: str, out: Path, *, seed: int = 0, dtype: str = "float32") -> Float64[NDArray[np.float64], "d d"]:
    """Write the turned twin of a llama or qwen2 checkpoint.

    Args:
        model: a folder or a hub id.
        out: the folder to make.
        seed: of the rotation.
        dtype: of the twin's tensors: float32, bfloat16 or float16.

    Returns:
        The rotation R, (d, d).

    Raises:
        DttError: another architecture, a quantized checkpoint, or `out` can't be written.
    """
    from scipy import stats

    if dtype not in _DTYPES:
        raise DttError(f"dtype={dtype!r} is not possible for a twin; it is one of: {', '.join(_DTYPES)}.")
    checkpoint = open_checkpoint(model, need="all")
    architecture = (checkpoint.config().get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES or "quantization_config" in checkpoint.config():
        raise DttError(
            f"{model} ({architecture}) can't be turned; a twin needs an unquantized {' or '.join(ARCHITECTURES)}."
        )
    width = checkpoint.input_embedding().shape[1]
    rotation: NDArray[np.float64] = stats.ortho_group.rvs(width, random_state=np.random.default_rng(seed))
    with staged(out) as folder:
        _write_tensors(folder / "model.safetensors", checkpoint, rotation, dtype)
        config = {**checkpoint.config(), "tie_word_embeddings": False}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        for path in checkpoint.folder.iterdir():
            known = path.name == "config.json" or path.name.endswith(".index.json")
            if path.suffix in _CARRIED and not known and path.is_file():
                shutil.copyfile(path, folder / path.name)
    return rotation


def _write_tensors(
    path: Path, checkpoint: Checkpoint, rotation: Float64[NDArray[np.float64], "d d"], dtype: str
) -> None:
    """Write the turned tensors one by one, so that memory holds one at a time."""
    name_in_file, stored = _DTYPES[dtype]
    shapes = {name: location.shape for name, location in _in_order(checkpoint)}
    shapes[_HEAD] = shapes[_EMBEDDING]
    entries = [(name, name_in_file, shape, math.prod(shape) * stored.itemsize) for name, shape in shapes.items()]
    with path.open("wb") as file:
        file.write(safetensors_header(entries, {"format": "pt"}))
        for name in Bar(shapes, desc="turning", unit=" tensors", leave=False):
            file.write(turned_tensor(checkpoint, name, rotation).astype(stored).tobytes())


def _in_order(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorLocation]]:
    for name, location in checkpoint.tensors().items():
        if not name.endswith("rotary_emb.inv_freq"):
            yield name, location


def turned_tensor(
    checkpoint: Checkpoint, name: str, rotation: Float64[NDArray[np.float64], "d d"]
) -> Float32[NDArray[np.float32], ...]:
    """Return the tensor `name` of the twin, in its own shape.

    Raises:
        DttError: a tensor that these architectures don't have.
    """
    # float32 products of bfloat16 values keep more than the twin stores; R itself stays float64.
    r = rotation.astype(np.float32)  # (d, d)
    if name == _HEAD:
        source = _EMBEDDING if checkpoint.tied else _HEAD
        return _product(_read(checkpoint, source) * _read(checkpoint, _FINAL_NORM), r)  # (rows, d)
    if name == _EMBEDDING:
        return _product(_read(checkpoint, name), r)  # (rows, d)
    value = _read(checkpoint, name)
    match = _LAYER.match(name)
    if name == _FINAL_NORM or (match and match.group(2).endswith("layernorm")):
        return np.ones_like(value)
    if match:
        prefix, layer, kind = match.groups()
        if layer in _READERS:
            if kind == "bias":  # in the layer's own output space, which is not turned
                return value
            return _product(value * _read(checkpoint, f"{prefix}{_READERS[layer]}.weight"), r)  # (n, d)
        if layer in _WRITERS:
            return _product(value, r) if kind == "bias" else _product(r.T, value)  # (d,) or (d, n)
    raise DttError(f"{checkpoint.name} has the tensor {name}, which a twin can't be made of.")


def _product(
    left: Float32[NDArray[np.float32], "m n"], right: Float32[NDArray[np.float32], "n p"]
) -> Float32[NDArray[np.float32], "m p"]:
    product: NDArray[np.float32] = left @ right
    return product


def _read(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    location = checkpoint.tensors().get(name)
    if location is None:
        raise DttError(f"{checkpoint.name} has no tensor {name}; it can't be turned.")
    return location.read().astype(np.float32)
