"""One durable queue, as one channel reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio

from .._subscription import Subscription
from .._tasks import Hosted
from ..address import Queue
from ..broker import Broker
from ..errors import BrokerError, Closed, DeliveryLost
from ..message import Message

if TYPE_CHECKING:
    from ._item import Item

AT_ONCE: Final = 256
"""Messages that are taken over in one go."""
LINGER: Final = 5.0
"""Seconds after which what came too late for who asked for one message goes back."""


class Feed:
    """Receives from *address* and passes on to *arrived*; what it may hold is said by `allow`."""

    def __init__(
        self,
        broker: Broker,
        queue: str,
        address: Queue[bytes],
        no_ack: bool,
        arrived: Callable[[Feed, Sequence[Message[bytes]]], Awaitable[None]],
        failed: Callable[[Feed, BaseException], None],
    ) -> None:
        self.queue = queue
        self.address = address
        self.no_ack = no_ack
        self.active = True
        """Whether anything is still to be delivered."""
        self.held = 0
        """Messages that came and are not settled."""
        self.waiting: deque[Item] = deque()
        """What there was no credit for."""
        self.last: Message[bytes] | None = None
        """What was acknowledged last."""
        self.lock = asyncio.Lock()
        """Held by who receives one by one."""
        self._broker = broker
        self._arrived = arrived
        self._failed = failed
        self._prefetch = 1
        self._reading = True
        self._subscription: Subscription[bytes] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._returning: asyncio.Task[None] | None = None
        self._hosted = Hosted(f"brokerkit feed of Celery's {queue}", self._main)

    def __repr__(self) -> str:
        return f"<Feed {self.queue} held={self.held} of {self._prefetch}>"

    @property
    def left(self) -> bool:
        """Whether it has ended, or is about to."""
        task = self._hosted.task
        return self._hosted.stopping.is_set() or (task is not None and task.done())

    async def open(self, prefetch: int, *, reading: bool = True) -> None:
        """Return when the queue is read; without *reading* nothing is passed on, and `receive` is for the caller."""
        self._prefetch = prefetch
        self._reading = reading
        await self._hosted.__aenter__()

    async def close(self) -> None:
        """Hand back what is unsettled, and leave."""
        if self._timer is not None:
            self._timer.cancel()
        await self._hosted.__aexit__()

    def allow(self, prefetch: int) -> None:
        """Hold at most *prefetch* messages; 0 fetches nothing."""
        if prefetch != self._prefetch:
            self._prefetch = prefetch
            if self._subscription is not None:
                self._subscription.prefetch = prefetch

    async def flush(self) -> None:
        """Return when the last acknowledgement, and so all before it, is stored."""
        last = self.last
        if last is not None:
            with suppress(DeliveryLost, Closed):
                await last.ack(confirm=True)

    async def receive(self, timeout: float) -> Sequence[Message[bytes]]:
        """Return one message, or none after *timeout* seconds."""
        if self._subscription is None:
            raise Closed(f"{self!r} is not open")
        return await self._subscription.receive(timeout=timeout)

    def linger(self) -> None:
        """Look after a while whether something came that nobody has asked for."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.left:
            self._returning = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        async with self.lock:
            with suppress(BrokerError):  # then others have it anyway
                while messages := await self.receive(0):
                    for message in messages:
                        await message.release()

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with self._broker.subscribe(self.address, prefetch=self._prefetch, patient=True) as messages:
            self._subscription = messages
            if messages.prefetch != self._prefetch:
                messages.prefetch = self._prefetch
            started.set_result(None)
            async with anyio.create_task_group() as group:
                if self._reading:
                    group.start_soon(self._read, messages)
                await self._hosted.stopping.wait()
                group.cancel_scope.cancel()

    async def _read(self, messages: Subscription[bytes]) -> None:
        try:
            while True:
                await self._arrived(self, await messages.receive(limit=AT_ONCE))
        except Closed:
            if not self._hosted.stopping.is_set():
                self._failed(self, Closed(f"the queue {self.queue} is not read any more"))
        except BrokerError as error:
            self._failed(self, error)
