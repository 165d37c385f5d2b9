"""The public Python names: loaded when they are used, and used as docs/python.md does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import _index

import dtt_plugin
from tests.checkpoints import make_checkpoint
from tests.conftest import ROOT, write_tokens


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import dtt_plugin; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {"dtt_plugin", "dtt_plugin._startup"}


def test_every_public_name_is_there_and_documented() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    for name in dtt_plugin.__all__:
        assert getattr(dtt_plugin, name).__doc__
        assert f"`{name}`" in page
        assert name in dir(dtt_plugin)
    with pytest.raises(AttributeError, match="no attribute 'alignn'"):
        dtt_plugin.alignn  # type: ignore[attr-defined]  # noqa: B018


def test_no_public_name_needs_torch() -> None:
    code = "import sys, dtt_plugin as d; [getattr(d, name) for name in d.__all__]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "source-model", seed=1)
    make_checkpoint(tmp_path / "target-model", seed=2)
    write_tokens(tmp_path / "source.tokens.safetensors", width=32)
    monkeypatch.chdir(tmp_path)
    theirs, files = Path(_index.__file__).parent, _index.TaskIndex._iter_yaml_files  # which take long to read
    ours_only = staticmethod(lambda root: () if root == theirs else files(root))
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", ours_only)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {})
    residual, verified, asr = capsys.readouterr().out.split()[-3:]
    assert float(residual) > 0
    assert verified == "True"
    assert 0 <= float(asr) <= 1
