"""The pytest plugin: the fixture ``broker`` and the marker ``virtual_time``, for tests of every style.

``broker`` is a fresh broker on ``memory://`` that is not open yet, so it belongs to no event loop and to no async plugin: the
test opens it, or `running` does.  The same lines work under pytest-asyncio (strict or auto), anyio's plugin and a plain
``asyncio.run``::

    @pytest.mark.asyncio                       # or @pytest.mark.anyio
    async def test_orders_are_billed(broker: Broker) -> None:
        async with running(service, broker):
            await broker.publish(ORDERS, Order("o1", 10.0))
            await idle(broker)
            assert len(handled(broker, ORDERS)) == 1

Override the fixture ``brokerkit_url`` to run them on another broker, like ``redis://localhost/15``.

``@pytest.mark.virtual_time`` runs a test in virtual time, ``virtual_time(seed=7)`` with shuffled tasks too: every event loop
that is made while the test is set up, runs and is torn down is a `VirtualLoop`.  A loop that is wider than the test (pytest-asyncio's
``loop_scope``, a module's async fixtures under anyio) is made once for all, so mark all of its tests, or none.  Where a loop
factory is configured already, name ours there instead, for anyio's plugin::

    @pytest.fixture(params=range(10))
    def anyio_backend(request):                # each test with ten seeds
        return "asyncio", {"loop_factory": virtual_loop(request.param)}

and for pytest-asyncio from 1.4 on::

    def pytest_asyncio_loop_factories(config, item):
        return {"virtual": VirtualLoop}

It needs no async plugin, and changes nothing for tests that use neither.
"""

from __future__ import annotations

import asyncio
import asyncio.events
from collections.abc import Generator
from typing import Final
from weakref import WeakSet

import pytest

from ..broker import Broker, connect
from ..errors import ConfigError
from ._loop import VirtualLoop

_MARKER: Final = "virtual_time"


@pytest.fixture
def brokerkit_url() -> str:
    """Return the URL of the fixture ``broker``: a memory server of its own for each test.  Override it for another."""
    return "memory://"


@pytest.fixture
def broker(brokerkit_url: str) -> Broker:
    """Return a fresh broker that is not open yet: ``async with broker``, or ``async with running(service, broker)``."""
    return connect(brokerkit_url)


class _Loops:
    """Makes the event loops of one marked test."""

    def __init__(self, seed: int | None, others: WeakSet[VirtualLoop]) -> None:
        self._seed = seed
        self._all = others
        self._mine = 0

    def make(self) -> VirtualLoop:
        loop = VirtualLoop(self._seed)
        self._all.add(loop)
        self._mine += 1
        return loop

    @property
    def used(self) -> bool:
        """Whether the test had a loop of ours: one of its own, or an open one that is wider than a test."""
        return self._mine > 0 or any(not loop.is_closed() for loop in self._all)


_ALL: Final = pytest.StashKey[WeakSet[VirtualLoop]]()
_LOOPS: Final = pytest.StashKey[_Loops]()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.stash[_ALL] = WeakSet()
    config.addinivalue_line(
        "markers", f"{_MARKER}(seed=None): run the test's event loop in virtual time; with a seed, tasks shuffled by it"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have every loop virtual that is made while a marked test is set up, runs and is torn down."""
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return (yield)
    loops = item.stash[_LOOPS] = _Loops(_seed(marker), item.config.stash[_ALL])
    with pytest.MonkeyPatch.context() as patch:
        # All of asyncio.run, pytest-asyncio and anyio's plugin make their loops here, where no loop factory is configured.  An
        # event loop policy would not do: pytest-asyncio keeps one for the whole session, and Python 3.16 has none.
        patch.setattr(asyncio.events, "new_event_loop", loops.make)
        patch.setattr(asyncio, "new_event_loop", loops.make)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a marker with arguments that mean nothing."""
    marker = item.get_closest_marker(_MARKER)
    if marker is not None and (marker.args or set(marker.kwargs) - {"seed"} or not _is_seed(marker.kwargs.get("seed"))):
        raise ConfigError(f"@pytest.mark.{_MARKER} takes seed=, a whole number or None, and nothing else")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a marked test whose loop was not virtual: nothing that is asked for is ignored."""
    result = yield
    loops = item.stash.get(_LOOPS, None)
    if loops is not None and not loops.used:
        raise ConfigError(
            f"@pytest.mark.{_MARKER} had no effect: the test made no event loop, or one from a loop factory, or it ran in one "
            "that is older than the test; see brokerkit.testing.plugin"
        )
    return result


def _is_seed(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _seed(marker: pytest.Mark) -> int | None:
    seed = marker.kwargs.get("seed")
    return seed if isinstance(seed, int) else None
