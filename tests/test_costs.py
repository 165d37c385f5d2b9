"""What a command is said to have cost is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from dtt_plugin.costs import peak_memory_mb


def test_the_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(50_000_000)  # 400 MB
    code = "from dtt_plugin.costs import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory_mb() > held.nbytes / 1e6
    assert 5 < float(done.stdout) < 200
