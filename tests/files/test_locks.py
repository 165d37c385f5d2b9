"""Lock files: one holder at a time, none of them stays."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dtt_plugin.files.locks import locked, remove_free_locks

COUNT = """
import sys
from pathlib import Path
from dtt_plugin.files.locks import locked

counter, lock = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(50):
    with locked(lock):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_processes_and_threads_exclude_each_other_and_leave_no_file(tmp_path: Path) -> None:
    counter, lock = tmp_path / "counter", tmp_path / "a.lock"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(counter), str(lock)]
    processes = [subprocess.Popen(command) for _ in range(2)]

    def count() -> None:
        for _ in range(50):
            with locked(lock):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert counter.read_text() == str(4 * 50)
    assert os.listdir(tmp_path) == ["counter"]


def test_a_lock_that_is_held_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        remove_free_locks(tmp_path)
        assert path.exists()
    assert not path.exists()


def test_what_a_killed_process_left_is_taken_over_or_removed(tmp_path: Path) -> None:
    (tmp_path / "taken.lock").touch()
    with locked(tmp_path / "taken.lock", wait=False):
        pass
    (tmp_path / "left.lock").touch()
    (tmp_path / "held.lock").touch()
    with (tmp_path / "held.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_free_locks(tmp_path)
    assert os.listdir(tmp_path) == ["held.lock"]
