"""What all tests share: the servers are there before the first of them, and gone after the last."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

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
TOGETHER: Final = tuple(
    re.compile(tests)
    for tests in (
        # Three workers of Celery on each system, and one with each pool.
        r"tests/celery/test_crew_.*\[(redis|kafka)\b",
        r"tests/celery/test_async_tasks\.py.*\[(\w+)-",
        # Brokers of their own.
        r"tests/faults/test_kafka_plays\.py",
        r"tests/kafka/test_admin\.py::(test_topics_are_stored_as_often_as_asked_for)",
        r"tests/kafka/test_connect\.py",
        r"tests/servers/test_kafka_network\.py",
        r"tests/servers/test_kafka_server\.py",
        # What is built, or read by the type checkers.
        r"tests/test_package\.py",
        r"tests/typing/test_typing\.py",
    )
)
"""Tests that share what takes long to make, or what is too heavy to be there twice.

One process runs all that one of these finds, or that it finds with the same words in its group.
"""
LONG: Final = re.compile(r"tests/(benchmarks|celery|faults|processes|servers)/|tests/conformance/test_kafka")
"""Where tests take seconds: they start programs, or wait for a Kafka."""
ENDS: Final = {"together": 0.5, "short": 1.0}
"""When in a run the last unit of a kind begins; those of each file with long tests have the time between."""
RUN = pytest.StashKey[kafka.Run]()


def scope(nodeid: str) -> str:
    """Return what tests with the same one are run by the same process for."""
    for tests in TOGETHER:
        if found := tests.match(nodeid):
            return " ".join((tests.pattern, *found.groups()))
    return nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Give each test to the process that is free, and those of some files to one.

    Marks of groups would do the same, but pytest from 9.2 on does not heed what pytest-xdist 3.8 makes of them.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # what one process runs together would come first, all at a time
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = scope
    return scheduling


def spread(nodeids: Sequence[str]) -> list[int]:
    """Return the order in which many processes run tests: the long ones are spread over all but the end of the run.

    So there are always as many of them at a time, and in the end nobody waits for one.
    """
    units: dict[str, list[int]] = {}
    for number, nodeid in enumerate(nodeids):
        units.setdefault(scope(nodeid), []).append(number)
    kinds = {name: kind(name, nodeids[numbers[0]]) for name, numbers in units.items()}
    sizes = Counter(kinds.values())
    # Not all begin with their first.
    behind = {name: number / len(sizes) for number, name in enumerate(sizes)}
    seen: Counter[str] = Counter()
    places: dict[str, float] = {}
    for name in units:
        of = kinds[name]
        places[name] = ENDS.get(of, 0.9) * (seen[of] + behind[of]) / sizes[of]
        seen[of] += 1
    return [number for name in sorted(units, key=lambda name: places[name]) for number in units[name]]


def kind(name: str, nodeid: str) -> str:
    """Return what a unit of tests is spread together with."""
    if name != nodeid:
        return "together"
    return nodeid.partition("::")[0] if LONG.match(nodeid) else "short"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests for the scheduler above, which takes them as they come."""
    if getattr(config.option, "loadgroup", False):  # as pytest-xdist tells its processes
        items[:] = [items[number] for number in spread([item.nodeid for item in items])]


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
