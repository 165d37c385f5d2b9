"""Checkpoints with quantized linear layers and plain embeddings: only the embeddings change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dtt_plugin.bake import altered_since, bake, read_manifest
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.tensors import TensorLocation
from dtt_plugin.errors import DttError
from dtt_plugin.inspection import inspect_path
from tests.bake_helpers import load, logits_of_ids, logits_of_rows, random_tokens, tiny
from tests.checkpoints import write_weights

WIDTH, GROUP = 32, 16
PROMPT = [3, 50, 17, 200, 90, 264]
Tensors = dict[str, NDArray[Any]]


def packed(values: NDArray[Any], *, axis: int) -> NDArray[np.int32]:
    """Pack unsigned four-bit values, eight to an int32 along `axis`."""
    nibbles = np.moveaxis(values.astype(np.uint32), axis, -1)
    nibbles = nibbles.reshape(*nibbles.shape[:-1], -1, 8)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis).view(np.int32))


def four_bit(weight: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize [out, in] in groups of `GROUP` inputs: values 0..15 around 8, and scales [out, groups]."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, GROUP)
    scales = np.abs(groups).max(axis=-1) / 7
    values = np.rint(groups / scales[..., None]) + 8
    return values.reshape(weight.shape).astype(np.uint8), scales


def awq(weight: NDArray[Any]) -> Tensors:
    values, scales = four_bit(weight)
    zeros = np.full((scales.shape[1], len(weight)), 8)
    return {
        "qweight": packed(values.T, axis=1),
        "qzeros": packed(zeros, axis=1),
        "scales": scales.T.astype(np.float16),
    }


def gptq(weight: NDArray[Any]) -> Tensors:
    values, scales = four_bit(weight)
    zeros = np.full((scales.shape[1], len(weight)), 7)
    group_of_input = np.arange(weight.shape[1], dtype=np.int32) // GROUP
    return {
        "qweight": packed(values.T, axis=0),
        "qzeros": packed(zeros, axis=1),
        "scales": scales.T.astype(np.float16),
        "g_idx": group_of_input,
    }


def fp8(weight: NDArray[Any]) -> Tensors:
    scale = np.abs(weight.astype(np.float32)).max() / 448
    return {
        "weight": (weight.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.full((1, 1), scale, np.float32),
    }


def compressed_tensors(weight: NDArray[Any]) -> Tensors:
    values, scales = four_bit(weight)
    return {
        "weight_packed": packed(values, axis=1),
        "weight_scale": scales.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(weight.shape, np.int64),
    }


GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
SCHEMES: dict[str, tuple[Callable[[NDArray[Any]], Tensors], dict[str, Any]]] = {
    "awq": (awq, {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "fp8": (fp8, {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "modules_to_not_convert": []}),
    "compressed-tensors": (
        compressed_tensors,
        {
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUPS}},
            "ignore": [],
        },
    ),
}


def quantized(folder: Path, scheme: str, *, tied: bool, quantize_head: bool = False, names_head: bool = False) -> Path:
    """Write a checkpoint whose linear layers are stored as `scheme` stores them.

    With `names_head` the list of plain modules names the head, as published checkpoints have it.
    """
    tiny(folder, width=WIDTH, tied=tied, extra_rows=4)  # 272 rows: eight to a word
    quantize, settings = SCHEMES[scheme]
    stored: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj") or (quantize_head and stem == "lm_head"):
            stored |= {f"{stem}.{part}": value for part, value in quantize(tensor).items()}
        else:
            stored[name] = tensor
    write_weights(folder, stored, shards=2)
    (folder / "model.safetensors").unlink()
    plain: dict[str, Any] = {key: ["lm_head"] for key in ("ignore", "modules_to_not_convert") if key in settings}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": scheme, **settings, **(plain if names_head else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def raw(location: TensorLocation) -> bytes:
    buffer = np.empty(location.nbytes, np.uint8)
    location.read_into(buffer, 0)
    return buffer.tobytes()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_quantized_layers_stay_as_they_are(tmp_path: Path, scheme: str, tied: bool) -> None:
    base_folder, out = quantized(tmp_path / "base", scheme, tied=tied), tmp_path / "baked"
    report = bake(str(base_folder), random_tokens(WIDTH), out)
    base = open_checkpoint(str(base_folder), need="all").tensors()
    baked = open_checkpoint(str(out), need="all").tensors()
    assert report.verified
    assert set(report.changed_tensors) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert baked.keys() == base.keys() | {"lm_head.weight"}
    for name in base.keys() - set(report.changed_tensors):
        assert (baked[name].dtype, baked[name].shape) == (base[name].dtype, base[name].shape)
        assert raw(baked[name]) == raw(base[name]), name
    for name in report.changed_tensors:
        assert baked[name].dtype == "BF16"
    before, after = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (base_folder, out))
    plain = next((key for key in ("ignore", "modules_to_not_convert") if key in before), None)
    if tied and plain:  # the new head must not be taken for a quantized layer
        assert after.pop(plain) == ["lm_head"]
        assert before.pop(plain) == []
    assert after == before
    assert inspect_path(out)["altered"] == ""
    assert not altered_since(out, read_manifest(out))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_computes_with_the_quantized_layers_what_it_did(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    base_folder = quantized(tmp_path / "base", "compressed-tensors", tied=tied, names_head=True)
    tokens = random_tokens(WIDTH)
    report = bake(str(base_folder), tokens, tmp_path / "baked")
    base, baked = load(base_folder), load(tmp_path / "baked")
    rows = torch.tensor(tokens.rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    size = report.base_rows
    expected = logits_of_rows(base, rows, PROMPT)[:, :size]
    assert expected.abs().max() > 0.1
    assert torch.allclose(logits_of_ids(baked, [*report.token_ids, *PROMPT])[:, :size], expected, atol=1e-4, rtol=0)
    assert torch.allclose(logits_of_ids(baked, PROMPT)[:, :size], logits_of_ids(base, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_quantized_head_is_refused_in_one_sentence(tmp_path: Path, scheme: str) -> None:
    base = quantized(tmp_path / "base", scheme, tied=False, quantize_head=True)
    with pytest.raises(
        DttError, match=r"^The output head of .* is quantized \(lm_head.*; use a checkpoint whose .*\.$"
    ):
        bake(str(base), random_tokens(WIDTH), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize(
    "parts", [{"qweight": np.int32, "scales": np.float16}, {"weight": np.int8}, {"weight_packed": np.int32}]
)
def test_quantized_embeddings_are_refused_in_one_sentence(tmp_path: Path, parts: dict[str, Any]) -> None:
    base = tiny(tmp_path / "base", width=WIDTH)
    stored = load_file(base / "model.safetensors")
    shape = stored.pop("model.embed_tokens.weight").shape
    stored |= {f"model.embed_tokens.{part}": np.ones(shape, dtype) for part, dtype in parts.items()}
    write_weights(base, stored)
    with pytest.raises(DttError, match=r"^The input embedding of .* is quantized \(.*; use the model's original"):
        bake(str(base), random_tokens(WIDTH), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_float8_embeddings_are_refused_in_one_sentence(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", width=WIDTH)
    stored = load_file(base / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].astype(ml_dtypes.float8_e4m3fn)
    write_weights(base, stored)
    with pytest.raises(DttError, match=r"has the type F8_E4M3; only bfloat16, float16 and float32 embeddings"):
        bake(str(base), random_tokens(WIDTH), tmp_path / "baked")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    base = tiny(tmp_path / "base", width=WIDTH)
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(DttError, match=r"^.* holds pickled weights only, .*; convert it with .*\.$"):
        bake(str(base), random_tokens(WIDTH), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
