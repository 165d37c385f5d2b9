"""vLLM's own model with the replaced layer, loaded without an engine: the baked checkpoint's rows, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT, write_tokens

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def loaded(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.serving.loaded_model", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def facts(*arguments: str) -> dict[str, Any]:
    done = loaded(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)]
)
def test_two_files_rows_are_the_baked_checkpoints_and_all_others_the_models(
    stored: str, dtype: str, tmp_path: Path
) -> None:
    base = str(make_checkpoint(tmp_path / "base", width=64, reserved=12, dtype=stored))
    files = [write_tokens(tmp_path / f"{name}.safetensors", width=64, seed=ord(name)) for name in "ab"]
    both = facts(base, dtype, *files)
    twin = facts(
        str(bake(base, load_tokens(files[0]), tmp_path / "twin", BakeOptions(reuse_reserved=True)).folder), dtype
    )
    first, second = both["ids"][:5], both["ids"][5:]
    assert both["dtype"] == f"torch.{dtype}"
    assert both["never"] == sorted(both["ids"])
    assert twin["never"] == sorted(first)
    for i, (row, baked) in enumerate(zip(both["embedded"], twin["embedded"], strict=True)):
        assert (row == baked) == (i not in second), i
    assert both["columns"] == [1, len(both["embedded"]), 64]


def test_an_engine_without_the_plugin_or_with_a_changed_file_does_not_start(tmp_path: Path) -> None:
    base = str(make_checkpoint(tmp_path / "base", width=64, extra_rows=10))
    file = write_tokens(tmp_path / "a.safetensors", width=64)
    assert (
        "leaves the vLLM plugin dtt_plugin out"
        in subprocess.run(
            [sys.executable, "-c", "from dtt_plugin.serving.hooks import problem; print(problem())"],
            env={**os.environ, "VLLM_PLUGINS": "another"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    done = loaded(base, "float32", file, file + ".absent")
    assert done.returncode == 1
    assert "absent can't be read" in done.stderr
