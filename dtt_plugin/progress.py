"""Progress with the remaining time: live on a terminal, elsewhere one line every 30 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from dtt_plugin.safe_text import one_line

_LOG_SECONDS = 30.0
_WAITING = "{desc} {elapsed}"
_STEP = "{desc} {bar:20} {percentage:3.0f} %  {elapsed}, {remaining} left{postfix}"


class Bar(tqdm):  # type: ignore[misc,unused-ignore]
    """A tqdm bar that appears after two seconds, and writes whole lines where stderr is no terminal.

    Takes tqdm's arguments.
    """

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("delay", 2)
        options.setdefault("dynamic_ncols", True)
        if not _is_terminal(options.get("file") or sys.stderr):
            # Position 0: no bar moves the cursor, which a log has not, below another one.
            options |= {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS, "position": 0}
        super().__init__(*args, **options)

    def close(self) -> None:
        """End the bar; what is not to stay leaves no trace in a log."""
        if not self.disable and not self.leave and not _is_terminal(self.fp):
            self.disable = True
        super().close()

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what shows a state of the bar."""
        if _is_terminal(file):
            shown: Callable[[str], None] = tqdm.status_printer(file)
            return shown

        def line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return line


def _is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", lambda: False)())


class Steps:
    """One line a step on stderr: a live bar while it runs, then how long it took.

    Args:
        width: of the steps' names.
    """

    def __init__(self, width: int = 28) -> None:
        self._width = width
        self._name = ""
        self._begun = 0.0
        self._bar: Bar | None = None
        self._part = ""
        self._said: set[str] = set()
        self._shown = time.monotonic()
        self._lock = threading.Lock()

    def begin(self, name: str) -> None:
        """Begin a step; one that runs is over."""
        self.end()
        self._name, self._begun, self._shown = name, time.perf_counter(), time.monotonic()
        self.advance(0, None, "")

    def advance(self, done: float, total: float | None, what: str) -> None:
        """Show how far the step's present part is; without a total, how long it takes already."""
        if not self._name:
            return
        if self._bar is None or (self._bar.total, self._part) != (total, what):
            self._close()
            self._part = what
            at_once = 0 if _is_terminal(sys.stderr) else 2
            name = self._name.ljust(self._width)
            self._bar = Bar(total=total, desc=name, leave=False, delay=at_once, bar_format=_STEP if total else _WAITING)
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)

    def end(self, note: str = "") -> None:
        """End the step that runs, if any, and leave its line."""
        if not self._name:
            return
        self._close()
        seconds = time.perf_counter() - self._begun
        self.say(f"{self._name.ljust(self._width)} {seconds:7.1f} s  {note}".rstrip())
        self._name = ""

    def hear(self, event: Mapping[str, Any]) -> None:
        """Show an event of a process that evaluates (`dtt_plugin.quiet`)."""
        with self._lock:
            self._hear(event)

    def _hear(self, event: Mapping[str, Any]) -> None:
        if "step" in event:
            self.end()
            if event["step"]:
                self.begin(event["step"])
        elif "total" in event:
            self.advance(event["done"], event["total"], event["what"])
        elif "tick" in event and self._bar is not None:
            if time.monotonic() - self._shown >= (0 if _is_terminal(sys.stderr) else _LOG_SECONDS):
                self._shown = time.monotonic()
                self._bar.refresh()
        elif "error" in event:
            self.end("failed")
        elif "warning" in event and event["warning"] not in self._said:
            self._said.add(event["warning"])
            self.say(f"note: {one_line(event['warning'])}")

    def say(self, line: str) -> None:
        """Leave a line above the live one."""
        if _is_terminal(sys.stderr):
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
