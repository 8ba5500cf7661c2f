"""One durable queue, as one channel reads it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio

from .._redact import error_text
from .._subscription import Subscription
from .._tasks import Hosted
from ..address import Queue
from ..broker import Broker
from ..errors import BrokerError, BrokerUnavailable, Closed
from ..message import Message

logger = logging.getLogger("brokerkit")

AT_ONCE: Final = 256
"""Messages that are taken over in one go."""


class Feed:
    """Receives from *address* and passes on to *arrived*; what it may hold is said by `allow`.

    Without *arrived* nothing is passed on, and `receive` is for whoever asks.
    """

    def __init__(
        self,
        broker: Broker,
        queue: str,
        address: Queue[bytes],
        no_ack: bool,
        arrived: Callable[[Feed, Sequence[Message[bytes]]], Awaitable[None]] | None = None,
        failed: Callable[[Feed, BaseException], None] | None = None,
    ) -> None:
        self.queue = queue
        self.address = address
        self.no_ack = no_ack
        self.active = True
        """Whether anything is still to be delivered."""
        self.held = 0
        """Messages that came and are not settled."""
        self.lock = asyncio.Lock()
        """Held by who receives one by one."""
        self._broker = broker
        self._arrived = arrived
        self._failed = failed
        self._prefetch = 1
        self._subscription: Subscription[bytes] | None = None
        self._hosted = Hosted(f"brokerkit feed of Celery's {queue}", self._main)

    def __repr__(self) -> str:
        return f"<Feed {self.queue} held={self.held} of {self._prefetch}>"

    @property
    def left(self) -> bool:
        """Whether it has ended, or is about to."""
        task = self._hosted.task
        return self._hosted.stopping.is_set() or (task is not None and task.done())

    def owns(self, message: Message[bytes]) -> bool:
        """Tell whether *message*, which came from here, is certainly not somebody else's by now."""
        return self._subscription is not None and self._subscription.owns(message)

    async def open(self, prefetch: int) -> None:
        """Return when the queue is read.  Once more it does nothing."""
        if self._hosted.task is None:
            self._prefetch = prefetch
            await self._hosted.__aenter__()

    async def close(self) -> None:
        """Hand back what is unsettled, and leave."""
        await self._hosted.__aexit__()

    def allow(self, prefetch: int) -> None:
        """Hold at most *prefetch* messages; 0 fetches nothing."""
        if prefetch != self._prefetch:
            self._prefetch = prefetch
            if self._subscription is not None:
                self._subscription.prefetch = prefetch

    async def receive(self, timeout: float) -> Sequence[Message[bytes]]:
        """Return one message, or none after *timeout* seconds."""
        if self._subscription is None:
            raise Closed(f"{self!r} is not open")
        return await self._subscription.receive(timeout=timeout)

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with self._broker.subscribe(self.address, prefetch=max(1, self._prefetch), patient=True) as messages:
            self._subscription = messages
            if messages.prefetch != self._prefetch:
                messages.prefetch = self._prefetch
            started.set_result(None)
            async with anyio.create_task_group() as group:
                if self._arrived is not None:
                    group.start_soon(self._read, messages, self._arrived)
                await self._hosted.stopping.wait()
                group.cancel_scope.cancel()

    async def _read(
        self,
        messages: Subscription[bytes],
        arrived: Callable[[Feed, Sequence[Message[bytes]]], Awaitable[None]],
    ) -> None:
        try:
            while True:
                await arrived(self, await messages.receive(limit=AT_ONCE))
        except Closed:
            self._fail(Closed(f"the queue {self.queue} is not read any more"))
        except BrokerError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("queue %s: reading it failed", self.queue)
            failed = BrokerUnavailable(f"reading the queue {self.queue} failed: {error_text(error)}")
            failed.__cause__ = error
            self._fail(failed)

    def _fail(self, error: BrokerError) -> None:
        if self._failed is not None and not self._hosted.stopping.is_set():
            self._failed(self, error)
