"""A plugin of pytest for suites that others have written: writes down each test's outcome, and ends a test that hangs.

Loaded with ``-p`` by the process that `run` starts.  The file named by the environment gets a line of JSON for each test.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Final

import pytest

FILE: Final = "BROKERKIT_SUITE_REPORT"
LIMIT: Final = "BROKERKIT_SUITE_LIMIT"
LEFT_OUT: Final = "BROKERKIT_SUITE_LEFT_OUT"
CHOSEN: Final = "BROKERKIT_SUITE_CHOSEN"
_failed: dict[str, str] = {}
"""What is known of the tests that run: the first thing that failed."""
_marked: dict[str, str] = {}
_seconds: dict[str, float] = {}


class Hangs(BaseException):
    """A test takes longer than any of them may; no handler of the code under test is to catch it."""


def pytest_configure(config: pytest.Config) -> None:
    # Kombu reads the entry points there; Celery and all that sends or receives messages import it, a bare connection does not.
    importlib.import_module("kombu.serialization")
    # Their own plugins for reruns and time limits are not needed: these marks are for them.
    for mark in ("flaky", "timeout", "env"):
        config.addinivalue_line("markers", f"{mark}(...): of a plugin that is not there")
    signal.signal(signal.SIGALRM, _hangs)


def name(nodeid: str) -> str:
    """Return a test's name without the folders, which differ from run to run."""
    path, _, test = nodeid.partition("::")
    file = path.rpartition("/")[2]
    return f"{file}::{test}" if file else test


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = json.loads(os.environ.get(LEFT_OUT, "[]"))
    chosen = json.loads(os.environ.get(CHOSEN, "[]"))
    kept = [item for item in items if name(item.nodeid) not in left_out and (not chosen or name(item.nodeid) in chosen)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    signal.alarm(int(os.environ.get(LIMIT, "120")))
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = name(report.nodeid)
    _seconds[test] = _seconds.get(test, 0.0) + report.duration
    if report.failed:
        _failed.setdefault(test, f"{report.when}: {_told(report)}")
    elif report.skipped:
        _marked.setdefault(test, "xfailed" if hasattr(report, "wasxfail") else "skipped")
    if report.when != "teardown":
        return
    why = _failed.pop(test, "")
    outcome = "failed" if why else _marked.get(test, "passed")
    _marked.pop(test, None)
    line = json.dumps({"test": test, "outcome": outcome, "why": why, "seconds": _seconds.pop(test)})
    with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _told(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(getattr(crash, "message", report.longrepr))
    return text.strip()[:500]


def _hangs(signum: int, frame: FrameType | None) -> None:
    faulthandler.dump_traceback(all_threads=True)
    # Once more, where the test's own clean-up hangs too.
    signal.alarm(15)
    raise Hangs("the test hangs")
