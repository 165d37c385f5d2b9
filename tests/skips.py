"""With `CI=true` a skipped test fails the run, unless its reason is one that a continuous integration machine may have.

A suite that skips what it can't run looks the same as one that passed. On a user's machine a skip is fine: its reason
is printed.
"""

from __future__ import annotations

import os
import re

import pytest

EXPECTED = (
    "no file at hand that can be opened and not read",  # root reads every file
    "this file system has names in UTF-8 only",
    "needs vLLM's CPU build",  # a machine with a GPU
    "no CUDA device",
    "sep/SEP_dataset.json not at hand",  # 12 MB that nobody's machine needs for the other tests
)
"""Beginnings of the reasons that don't fail a run under CI."""

_skipped: dict[str, str] = {}


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        place = report.longrepr
        reason = place[2] if isinstance(place, tuple) else str(place)
        _skipped[report.nodeid] = re.sub(r"^Skipped: ", "", reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _unexpected() -> dict[str, str]:
    if os.environ.get("CI") != "true":
        return {}
    return {test: reason for test, reason in _skipped.items() if not reason.startswith(EXPECTED)}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and _unexpected():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unexpected := _unexpected():
        terminalreporter.section("skipped under CI, which counts as failed", red=True)
        for test, reason in unexpected.items():
            terminalreporter.line(f"{test}: {reason}")
