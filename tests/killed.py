"""Running a command that dies at its n-th change of the file system, as by SIGKILL or a power cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One process that has imported everything forks a child for each run: it reads [n, arguments], one JSON a line.
_FORKING = """
import json, os, signal, sys
import dtt_plugin.bake, dtt_plugin.tokens.peft, dtt_plugin.transfer.move, dtt_plugin.alignment
from dtt_plugin.cli import main

def die_at(calls):
    left = [calls]
    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)
        return call
    for name in ("open", "mkdir", "unlink", "rmdir", "rename", "replace", "link", "symlink", "chmod", "fsync"):
        setattr(os, name, counted(getattr(os, name)))

for line in sys.stdin:
    calls, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        die_at(calls)
        os._exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Runs `dtt` commands that die early."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, calls: int, *arguments: object) -> bool:
        """Run `dtt` with `arguments` and kill it at its file system call number `calls`; False: it ended before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([calls, list(map(str, arguments))]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in (0, -9), code
        return code == -9


@contextmanager
def killer(**environment: Any) -> Iterator[Killer]:
    """Yield something that runs commands with these environment variables."""
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", _FORKING],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Killer(process)  # it ends where its input does
