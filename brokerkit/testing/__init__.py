"""Tools for tests of services: no server and no sleeps.

A handler is a function: call it with a `message` and look at the message afterwards.  A whole service runs inside of
`running`, on ``memory://`` with its real semantics; `idle` waits until it has nothing left to do, then `handled` and
`dead_letters` tell what it did::

    async def test_an_order_of_nothing_is_dead_lettered() -> None:
        async with running(service) as broker:
            await broker.publish(ORDERS, Order("o2", 0.0))
            await idle(broker)
            assert handled(broker, ORDERS) == []
            [letter] = await dead_letters(broker, ORDERS, "billing")
            assert letter.dead.reason == "nothing to pay"

`run` runs a test in virtual time, where an hour's delay takes none and a *seed* shuffles the order of tasks; `faults` breaks
the connection on purpose.  The pytest plugin (`brokerkit.testing.plugin`) adds the fixture ``broker`` and the marker
``virtual_time``.  Drivers are tested by `brokerkit.testing.conformance`.
"""

from __future__ import annotations

from ..drivers.memory import Faults
from ._idle import NotIdle, idle
from ._loop import Deadlock, VirtualLoop, now, run, virtual_loop
from ._messages import message
from ._services import dead_letters, faults, handled, running

__all__ = [
    "Deadlock",
    "Faults",
    "NotIdle",
    "VirtualLoop",
    "dead_letters",
    "faults",
    "handled",
    "idle",
    "message",
    "now",
    "run",
    "running",
    "virtual_loop",
]
