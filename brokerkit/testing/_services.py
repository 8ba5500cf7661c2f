"""A service under test: running it, waiting until it has done everything, and looking at what it did."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeVar, overload

from ..address import Queue, Topic
from ..broker import Broker, connect
from ..drivers.memory import Faults
from ..errors import CapabilityError, ConfigError
from ..message import Letter, Message
from ..service import Service
from ._idle import Watch

T = TypeVar("T")


@asynccontextmanager
async def running(
    service: Service[Any], broker: Broker | None = None, *, url: str = "memory://", drain: float = 25
) -> AsyncGenerator[Broker]:
    """Run *service* on *broker*, or on a new one for *url*, and yield the broker.

    A broker that is not open yet is opened, and closed at the end::

        async with running(service) as broker:
            await broker.publish(ORDERS, Order("o1", 10.0))
            await idle(broker)
            assert [message.value.id for message in handled(broker, ORDERS)] == ["o1"]

    Several services may run on one broker, each in a block of its own.
    """
    broker = connect(url) if broker is None else broker
    if broker._state == "new":
        async with broker, _running(service, broker, drain):
            yield broker
    else:
        async with _running(service, broker, drain):
            yield broker


@asynccontextmanager
async def _running(service: Service[Any], broker: Broker, drain: float) -> AsyncGenerator[None]:
    if Watch.of(broker) is None:
        # Innermost: what another middleware keeps from the handler, no handler has finished.
        broker.middleware = (*broker.middleware, Watch())
    async with service.running(broker, drain=drain):
        yield


@overload
def handled(broker: Broker, address: Topic[T], group: str | None = None) -> list[Message[T]]: ...
@overload
def handled(broker: Broker, address: Queue[T, Any]) -> list[Message[T]]: ...
def handled(broker: Broker, address: Topic[Any] | Queue[Any, Any], group: str | None = None) -> list[Message[Any]]:
    """Return the messages of *address* that handlers on *broker* finished well and acknowledged, in that order.

    Of a topic, those of every group, or of one *group*; redriven messages are among them.  Only what ran inside of `running`
    is seen.

    Raises:
        ConfigError: no service has run on *broker* inside of `running`.
    """
    watch = Watch.of(broker)
    if watch is None:
        raise ConfigError(f"{broker!r}: handled() sees what runs inside of brokerkit.testing.running(service, broker)")
    return watch.handled(broker._bindings.real(address), None if group is None else broker.prefix + group)


@overload
async def dead_letters(broker: Broker, address: Topic[T], group: str) -> list[Letter[T]]: ...
@overload
async def dead_letters(broker: Broker, address: Queue[T, Any]) -> list[Letter[T]]: ...
async def dead_letters(
    broker: Broker, address: Topic[Any] | Queue[Any, Any], group: str | None = None
) -> list[Letter[Any]]:
    """Return the dead letters of a queue, or of one *group* of a topic, oldest first.

    Raises:
        ConfigError: a topic without a group, or a queue with one.
    """
    if isinstance(address, Topic):
        if group is None:
            raise ConfigError(f"the dead letters of {address!r} are those of a group: name it")
        letters = address.dead_letters(group)
    elif group is not None:
        raise ConfigError(f"{address!r} has no groups")
    else:
        letters = address.dead_letters
    return [letter async for letter in broker.browse(letters, limit=1_000_000)]


def faults(broker: Broker) -> Faults:
    """Return what breaks *broker*'s connection to ``memory://`` on purpose.

    ``cut()`` ends it as ``kill -9`` would, ``freeze()`` and ``thaw()`` stop it and let it go on, ``disconnect()`` and
    ``reconnect()`` are the network's; ``lose_replies(n)``, ``fail_publishes(error, n)`` and ``fail_settles(error, n)`` hit
    the next calls::

        faults(broker).fail_publishes(BufferFull("no room"), 2)
        await broker.publish(ORDERS, Order("o1", 10.0))         # stored at the third try

    Raises:
        CapabilityError: *broker* is not on ``memory://``: break its server or its network instead.
    """
    found = getattr(broker._driver, "faults", None)
    if not isinstance(found, Faults):
        raise CapabilityError(
            f"{broker!r}: faults are made by memory:// alone; elsewhere break the server or its network"
        )
    return found
