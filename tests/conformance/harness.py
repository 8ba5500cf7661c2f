"""The memory driver's harness: all that its author wrote for the conformance suite."""

from __future__ import annotations

import itertools

from brokerkit.broker import Broker
from brokerkit.driver import Capabilities
from brokerkit.testing import faults
from brokerkit.testing.conformance import Harness

_numbers = itertools.count()


class MemoryHarness(Harness):
    column = "memory"
    virtual = True
    lease = 30.0
    session = 10.0
    quiet = 5.0
    bounded = {"max_messages": 24}
    deadline = 3600.0
    topics = Capabilities(backend="memory", replay=True, key_order=True, atomic=True)
    queues = Capabilities(backend="memory", delay=True, priority=True, ttl=True, dedup=True, shared=True, atomic=True)

    async def open(self) -> str:
        return f"memory://system{next(_numbers)}"

    async def crash(self, broker: Broker) -> None:
        faults(broker).cut()

    async def freeze(self, broker: Broker) -> None:
        faults(broker).freeze()

    async def thaw(self, broker: Broker) -> None:
        faults(broker).thaw()

    async def disconnect(self, broker: Broker) -> None:
        faults(broker).disconnect()

    async def reconnect(self, broker: Broker) -> None:
        faults(broker).reconnect()

    async def lose_replies(self, broker: Broker, count: int = 1) -> None:
        faults(broker).lose_replies(count)
