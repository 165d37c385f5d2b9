"""A process of our own whose output goes into a log, while what a person has to know is told line by line.

An engine prints hundreds of lines. The process that runs it writes events, one JSON object a line, into a pipe
of ours beside its output: whatever it calls `tell` with, how far the progress bars of any library in it are, and
the warnings of this package.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError

Event = dict[str, Any]
_PIPE = "DTT_EVENTS"  # environment variable with the number of the pipe's end
_END_SECONDS = 5.0
_TICK_SECONDS = 1.0
_ABOUT_OTHER_MODELS = "no --apply_chat_template"


# The process that is started ------------------------------------------------------------------------


def tell(**event: Any) -> None:
    """Tell the process that started this one; without such a process do nothing."""
    if _told is not None:
        with _lock:
            _told.write(json.dumps(event, default=str) + "\n")
            _told.flush()


def tell_progress_and_warnings() -> None:
    """Begin to tell what progress bars show, as `done`, `total`, `what`, and this package's warnings.

    Except the one about models that do not render conversations themselves: such a process loads ours.
    """
    from tqdm import tqdm

    display = tqdm.display

    def displayed(bar: Any, *args: Any, **options: Any) -> Any:
        if bar.total:
            tell(done=bar.n, total=bar.total, what=bar.desc or "")
        return display(bar, *args, **options)

    tqdm.display = displayed
    logging.getLogger("dtt_plugin").addHandler(_Warnings(logging.WARNING))


def do_job(run: Callable[[dict[str, Any]], None]) -> int:
    """Run the job on standard input, a line of JSON; end when that is closed, and tell what went wrong.

    Returns:
        The exit code.
    """
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    tell_progress_and_warnings()
    try:
        run(job)
    except DttError as error:
        tell(error=str(error))
        print(error, file=sys.stderr)
        return 2
    return 0


def _end_with_standard_input() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(130)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _ABOUT_OTHER_MODELS not in record.getMessage():
            tell(warning=record.getMessage())


def _open_pipe() -> Any:
    number = os.environ.pop(_PIPE, "")  # not for processes that this one starts
    if not number.isdecimal():
        return None
    os.set_inheritable(int(number), False)
    return os.fdopen(int(number), "w", encoding="utf-8")


_told = _open_pipe()
_lock = threading.Lock()


# The process that starts it -------------------------------------------------------------------------


def run_quietly(module: str, job: Mapping[str, Any], *, log: Path | None, listen: Callable[[Event], None]) -> None:
    """Run `python -m module`, which does `job` (`do_job`) and ends with this process.

    Args:
        module: what to run.
        job: for it, as JSON.
        log: the file that its output is added to; None leaves it on the terminal.
        listen: called with each event, and once a second with `tick`, from two threads.

    Raises:
        DttError: it failed.
    """
    errors: list[str] = []

    def hear(event: Event) -> bool:
        if "error" in event:
            errors.append(event["error"])
        listen(event)
        return True

    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        reading, writing = os.pipe()
        events = stack.enter_context(os.fdopen(reading, encoding="utf-8"))
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                pass_fds=(writing,),
                env={**os.environ, _PIPE: str(writing)},
                text=True,
            )
        finally:
            os.close(writing)
        listener = threading.Thread(target=lambda: all(hear(json.loads(line)) for line in events), daemon=True)
        listener.start()
        with process:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(job, default=str) + "\n")
                process.stdin.flush()
                while process.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_TICK_SECONDS)
                    listen({"tick": True})
            except BrokenPipeError:
                pass  # it died at once and has said why
            except BaseException:
                process.kill()
                raise
        listener.join(_END_SECONDS)  # a process that it forked may hold the pipe
    code = process.returncode
    if code < 0:
        hear({"error": f"its process was ended by {signal.Signals(-code).name}; is there enough memory?"})
    elif code and not errors:
        hear({"error": f"it ended with the code {code}, see " + (f"{log}: {_last_line(log)}" if log else "above")})
    if code:
        raise DttError(errors[0])


def _last_line(log: Path) -> str:
    """Return the last line of a log that says something, for a sentence about what went wrong."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
