"""A run under CI can't be green by skipping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_pytest(folder: Path, text: str, *, ci: bool) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(f"import pytest\n{text}\n")
    (folder / "test_other.py").write_text("def test_b(): pass\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.skips", "-p", "no:cacheprovider", "--rootdir=."]
    return subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "text",
    [
        "def test_a(): pytest.skip('no data here')",
        "@pytest.mark.skipif(True, reason='no data here')\ndef test_a(): pass",
        "pytest.skip('no data here', allow_module_level=True)",
        "pytest.importorskip('no_such_package_at_all')",
        "@pytest.fixture\ndef data(): pytest.skip('no data here')\ndef test_a(data): pass",
    ],
    ids=["in the test", "by a mark", "of the module", "by an import", "by a fixture"],
)
def test_a_skip_fails_the_run_under_ci_alone(tmp_path: Path, text: str) -> None:
    assert run_pytest(tmp_path, text, ci=False).returncode == 0
    failed = run_pytest(tmp_path, text, ci=True)
    assert failed.returncode == 1
    assert "skipped under CI, which counts as failed" in failed.stdout
    assert "no data here" in failed.stdout or "no_such_package_at_all" in failed.stdout


def test_a_skip_that_ci_may_have_passes(tmp_path: Path) -> None:
    text = "def test_a(): pytest.skip('no CUDA device')\n@pytest.mark.xfail\ndef test_b(): assert False"
    assert run_pytest(tmp_path, text, ci=True).returncode == 0
