"""Two synthetic checkpoints that look like two related models to an alignment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
