"""What all tests share: the servers are there before the first of them, and gone after the last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import servers
from .servers import kafka

HERE = Path(__file__).parent
SERVED = ("benchmarks", "conformance", "faults", "processes", "redis", "servers")
"""The folders whose tests need servers."""
KAFKA = ("benchmarks", "conformance", "faults", "kafka", "processes", "servers")
"""The folders whose tests need Kafka."""
RUN = pytest.StashKey[kafka.Run]()


def pytest_configure(config: pytest.Config) -> None:
    """Be the run that all processes of pytest-xdist are part of, unless this one is part of another's."""
    if kafka.VARIABLE not in os.environ:
        config.stash[RUN] = kafka.Run()


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        config.stash[RUN].close()


def pytest_sessionstart(session: pytest.Session) -> None:
    """End at once, with one line, if a server is missing that tests of this run need."""
    if hasattr(session.config, "workerinput"):  # the process that has started this one has looked
        return
    wanted = [Path(str(given).partition("::")[0]).resolve() for given in session.config.args]

    def needed(names: tuple[str, ...]) -> bool:
        folders = [HERE / name for name in names]
        return any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in wanted for folder in folders)

    try:
        if needed(SERVED):
            servers.require()
        if needed(KAFKA):
            kafka.prepare()
    except servers.Missing as error:
        pytest.exit(str(error), returncode=1)


def pytest_sessionfinish() -> None:
    servers.stop_shared()
