"""What a process prints goes into a log; what a person has to know is told."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.errors import DttError
from dtt_plugin.progress import Bar, Steps
from dtt_plugin.quiet import run_quietly

_WORKER = """
import logging, os, sys
from dtt_plugin.errors import DttError
from dtt_plugin.quiet import do_job, tell

def run(job):
    from tqdm import tqdm
    print("noise")
    print("more noise", file=sys.stderr)
    tell(step=job["name"])
    for _ in tqdm(range(3), desc="part", mininterval=0):
        pass
    logging.getLogger("dtt_plugin").warning("mind this")
    logging.getLogger("other").warning("not ours")
    if job["end"] == "refuse":
        raise DttError("this can't be done; do that.")
    if job["end"] == "break":
        raise RuntimeError("broken")
    if job["end"] == "kill":
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    sys.exit(do_job(run))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_worker.py").write_text(_WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "a_worker"


def test_output_goes_into_the_log_and_events_are_told(
    worker: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    run_quietly(worker, {"name": "first", "end": ""}, log=tmp_path / "log.txt", listen=told.append)
    assert {"tick": True} in told
    told = [event for event in told if "tick" not in event]
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "log.txt").read_text()
    assert "noise" in log
    assert "not ours" in log
    assert told[0] == {"step": "first"}
    assert {"done": 3, "total": 3, "what": "part"} in told
    assert [event for event in told if "warning" in event] == [{"warning": "mind this"}]


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("refuse", "this can't be done; do that."),
        ("break", r"ended with the code 1, see .*log.txt: RuntimeError: broken"),
        ("kill", "was ended by SIGKILL; is there enough memory"),
    ],
)
def test_a_process_that_fails_is_told_in_a_sentence(worker: str, end: str, sentence: str, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    with pytest.raises(DttError, match=sentence):
        run_quietly(worker, {"name": "x", "end": end}, log=tmp_path / "log.txt", listen=told.append)
    assert [event for event in told if "tick" not in event][-1].keys() == {"error"}


def test_without_a_log_the_output_stays_on_the_terminal(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    run_quietly(worker, {"name": "x", "end": ""}, log=None, listen=lambda event: None)
    out, err = capfd.readouterr()
    assert out == "noise\n"
    assert "more noise" in err


def test_a_bar_in_a_log_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt_plugin.progress._LOG_SECONDS", 0.0)
    log = io.StringIO()
    with Bar(total=2, desc="outer", delay=0, file=log):
        for _ in Bar(range(4), desc="part", delay=0, file=log, miniters=2):
            pass
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue(), "a bar within another"
    assert "part:  50%" in log.getvalue()
    assert "00:00<00:00" in log.getvalue(), "the remaining time"


def test_a_quick_bar_is_not_shown() -> None:
    log = io.StringIO()
    for _ in Bar(range(4), file=log):
        pass
    assert log.getvalue() == ""


def test_steps_leave_one_line_each_with_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(width=10)
    for event in (
        {"step": "first"},
        {"done": 1, "total": 2, "what": "x"},
        {"warning": "mind\x1b this"},
        {"warning": "mind\x1b this"},
        {"tick": True},
        {"step": "second"},
        {"error": "gone"},
        {"step": None},
    ):
        steps.hear(event)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("note: mind")
    assert "\x1b" not in lines[0]
    assert [line.split() for line in lines[1:]] == [["first", "0.0", "s"], ["second", "0.0", "s", "failed"]]


def test_a_step_without_a_bar_shows_in_a_log_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dtt_plugin.progress._LOG_SECONDS", 0.0)
    steps = Steps(width=10)
    steps.hear({"step": "load"})
    steps.hear({"tick": True})
    assert capsys.readouterr().err.startswith("load ")
