"""What all tests share: the servers are there before the first of them, and gone after the last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from . import servers
from .servers import kafka

HERE = Path(__file__).parent
SERVED = ("benchmarks", "celery", "conformance", "faults", "processes", "redis", "servers")
"""The folders whose tests need servers."""
KAFKA = ("benchmarks", "celery", "conformance", "faults", "kafka", "processes", "servers")
"""The folders whose tests need Kafka."""
TOGETHER = ("tests/faults/test_kafka_plays.py", "tests/typing/test_typing.py")
"""Files whose tests share what takes long to make, or what is too heavy to be there twice: one process runs them all."""
CREW = "tests/celery/test_crew_"
"""Files whose tests share three workers of Celery on each system."""
RUN = pytest.StashKey[kafka.Run]()


def scope(nodeid: str) -> str:
    """Return what tests with the same one are run by the same process for."""
    path = nodeid.partition("::")[0]
    if path.startswith(CREW):
        return f"{CREW} {'kafka' if '[kafka' in nodeid else 'redis'}"
    return path if path in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Give each test to the process that is free, and those of some files to one.

    Marks of groups would do the same, but pytest from 9.2 on does not heed what pytest-xdist 3.8 makes of them.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = scope
    return scheduling


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
