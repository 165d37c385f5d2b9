"""Threads that wait leave their core to others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("chosen", "sleeps"), [(None, True), ("active", False)])
def test_torch_threads_of_a_command_sleep_while_they_wait(chosen: str | None, sleeps: bool) -> None:
    pytest.importorskip("torch")
    code = "from dtt_plugin.cli import main; main(['cache', 'list']); import torch; torch.ones(2).sum()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": chosen} if chosen else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT" in done.stderr
    assert ("GOMP_SPINCOUNT = '0'" in done.stderr) == sleeps
