"""What the tests of this folder share: the brokers, a crew of workers that many of them use, and the tables of features.

Marks say which cells of the tables in docs/celery.md a test proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from brokerkit.celery import _bridge

from . import channels
from .channels import Place, placed
from .features import pytest_configure, pytest_itemcollected, pytest_runtest_makereport
from .systems import SYSTEMS, System, served
from .workers import Crew

__all__ = ["pytest_configure", "pytest_itemcollected", "pytest_runtest_makereport"]

NAMES = ("one", "two", "three")
Hire: TypeAlias = Callable[..., Crew]


@pytest.fixture(scope="package", params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Return the broker that a test is for."""
    with served(request.param) as started:
        yield started


@pytest.fixture(scope="package")
def crew(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Return three workers of two processes each, which no test stops, and which each leaves as it found them."""
    # Each of twenty threads that ask at a time has a connection for the question and one for the answers.
    with system.crew(tmp_path_factory.mktemp("crew"), broker_pool_limit=50) as hired:
        hired.start(*NAMES, options=["-E"])
        yield hired


@pytest.fixture
def hire(system: System, tmp_path: Path) -> Iterator[Hire]:
    """Return what gives a test an application of its own, whose workers it starts, and harms."""
    with ExitStack() as stack:

        def make(**config: Any) -> Crew:
            return stack.enter_context(system.crew(tmp_path, **config))

        yield make


@pytest.fixture(params=channels.SYSTEMS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Return names of the test's own in a broker, for channels without Kombu."""
    with placed(request.param) as made:
        yield made


@pytest.fixture
def here() -> Iterator[Place]:
    """Return a place for what is the same on all systems."""
    with placed("memory") as made:
        yield made


@pytest.fixture(autouse=True)
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections closed that a test has done with: later ones look whether they leave any open."""
    monkeypatch.setattr(_bridge, "LINGER", 0.1)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Return a file that tasks wait for; it is there after the test in any case."""
    path = tmp_path / "gate"
    yield path
    path.touch()
