"""What all tests share: the servers are there before the first of them, and gone after the last."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import servers

HERE = Path(__file__).parent
SERVED = ("benchmarks", "conformance", "faults", "processes", "redis", "servers")
"""The folders whose tests need servers."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """End at once, with one line, if a server is missing that tests of this run need."""
    if hasattr(session.config, "workerinput"):  # the process that has started this one has looked
        return
    wanted = [Path(str(given).partition("::")[0]).resolve() for given in session.config.args]
    folders = [HERE / name for name in SERVED]
    if any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in wanted for folder in folders):
        try:
            servers.require()
        except servers.Missing as error:
            pytest.exit(str(error), returncode=1)


def pytest_sessionfinish() -> None:
    servers.stop_shared()
