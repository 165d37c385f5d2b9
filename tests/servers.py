"""A server in a process of its own, behind an address on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

_START_SECONDS = 600


@contextmanager
def server(command: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """Run a server's command, with a free port where it says PORT, until it answers; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    with log.open("w") as out:
        process = subprocess.Popen(
            [part.replace("PORT", port) for part in command], env=environ, stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > limit:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(2)
        yield url
    finally:
        process.terminate()
        process.wait(60)
