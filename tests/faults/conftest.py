"""After a long run: what each play has seen."""

from __future__ import annotations

import pytest

from .test_plays import LONG


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LONG:
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
            for name, text in report.user_properties:
                if name == "play":
                    terminalreporter.write_line(str(text))
