"""The whole chain on real weights: a turned twin's tokens, aligned, transferred, baked, evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from dtt_plugin.alignment import load_alignment
from dtt_plugin.demo.model import MODELS, SMOLLM2
from dtt_plugin.tokens.files import load_tokens
from dtt_plugin.transfer.twin import turn_tokens, write_twin
from tests import conftest

TOKENS = MODELS[SMOLLM2].tokens


class Chain(NamedTuple):
    """What the commands made, all of it in one folder."""

    folder: Path
    twin: Path
    rotation: NDArray[np.float64]


def dtt(*arguments: str | Path) -> dict[str, Any]:
    """Run the real `dtt` command and return its JSON."""
    command = [sys.executable, "-c", "import sys; from dtt_plugin.cli import main; sys.exit(main())"]
    result = subprocess.run([*command, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.fixture(scope="module")
def chain(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """SmolLM2's tokens carried to its turned twin by the commands a user would type."""
    folder = tmp_path_factory.mktemp("chain")
    twin = folder / "twin"
    rotation = write_twin(smollm2, twin, seed=3, dtype="float32")
    dtt("align", smollm2, twin, "--out", folder / "alignment.safetensors", "--no-cache")
    dtt("transfer", TOKENS, folder / "alignment.safetensors", "--out", folder / "transferred.safetensors")
    dtt("bake", twin, "--tokens", folder / "transferred.safetensors", "--out", folder / "baked")
    return Chain(folder, twin, rotation)


def test_the_alignment_recovers_the_rotation(chain: Chain) -> None:
    W = load_alignment(chain.folder / "alignment.safetensors").W
    width = W.shape[0]
    assert np.linalg.norm(W - chain.rotation) / np.sqrt(width) < 2**-8, "worse than bfloat16"
    assert np.linalg.norm(W.T @ W - np.eye(width)) < 1e-12


def test_transferred_tokens_are_the_turned_ones(chain: Chain) -> None:
    native = load_tokens(TOKENS)
    transferred = load_tokens(chain.folder / "transferred.safetensors")
    turned = turn_tokens(native, chain.rotation, model="twin")
    assert transferred.method == "procrustes"
    np.testing.assert_allclose(np.linalg.norm(transferred.rows, axis=1), np.linalg.norm(native.rows, axis=1), rtol=1e-5)
    assert np.linalg.norm(transferred.rows - turned.rows) / np.linalg.norm(turned.rows) < 2**-8


def responses(model: Path | str, **arguments: object) -> list[str]:
    """Evaluate with dtt_hf, and return every response."""
    given = {"pretrained": str(model), "dtype": "float32", **{key: str(value) for key, value in arguments.items()}}
    results = conftest.evaluate("dtt_hf", given, limit=2, batch_size=8, gen_kwargs={"max_gen_toks": 16})
    assert "hacked_max,none" in results["results"]["injection_demo"]
    return [response for sample in results["samples"]["injection_demo"] for (response,) in sample["resps"]]


def test_the_twin_answers_as_the_original_with_transferred_tokens_and_not_with_copied_ones(
    chain: Chain, smollm2: str, tmp_path: Path
) -> None:
    original = responses(smollm2, tokens=TOKENS)
    assert len(original) == 8
    assert responses(chain.twin, tokens=chain.folder / "transferred.safetensors") == original
    assert responses(chain.folder / "baked") == original
    assert responses(chain.twin, tokens=TOKENS) != original, "copied tokens"
    assert responses(smollm2) != original, "no tokens"
