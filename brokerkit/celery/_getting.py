"""Messages that are asked for one by one (``basic_get``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from ..address import Queue
from ..errors import BrokerError
from ..message import Message
from ._exchanges import Exchanges
from ._feed import Feed
from ._item import Item

SHORT: Final = 0.2
LONG: Final = 5.0
"""Seconds for which one message is waited for: where the queue seems empty, and where it does not."""
MEANWHILE: Final = 0.02
"""Seconds for what came while its size was asked for."""
LINGER: Final = 2.0
"""Seconds for which a queue stays open for the next one."""


class Getting:
    """The queues from which one channel asks for single messages: nothing is fetched that nobody asked for."""

    def __init__(
        self, exchanges: Exchanges, received: Callable[[Feed, Message[bytes]], Awaitable[Item | None]]
    ) -> None:
        self._exchanges = exchanges
        self._received = received
        self._feeds: dict[str, Feed] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._looking: set[asyncio.Task[None]] = set()

    @property
    def feeds(self) -> Sequence[Feed]:
        """What is open."""
        return list(self._feeds.values())

    async def get(self, queue: str, address: Queue[bytes], no_ack: bool) -> Item | None:
        """Return the next message of *queue*, or None if there is none."""
        while True:
            feed = self._feeds.get(queue)
            if feed is None:
                feed = self._feeds[queue] = Feed(self._exchanges.broker, queue, address, no_ack)
            async with feed.lock:
                if not feed.left:
                    feed.no_ack = no_ack
                    return await self._get(feed)
                if self._feeds.get(queue) is feed:  # else it was closed while this waited for its turn
                    del self._feeds[queue]

    async def _get(self, feed: Feed) -> Item | None:
        timer = self._timers.pop(feed.queue, None)
        if timer is not None:
            timer.cancel()
        try:
            await feed.open(feed.held + 1)
            feed.allow(feed.held + 1)
            item = await self._next(feed, SHORT)
            if item is None:
                # Of what is on its way to this process, or here, the size knows nothing.
                empty = not await self._exchanges.size(feed.queue)
                item = await self._next(feed, MEANWHILE if empty else LONG)
        except BaseException:
            if feed.left and self._feeds.get(feed.queue) is feed:
                del self._feeds[feed.queue]
            raise
        finally:
            feed.allow(feed.held)
            if self._feeds.get(feed.queue) is feed:
                loop = asyncio.get_running_loop()
                self._timers[feed.queue] = loop.call_later(LINGER, self._look, feed)
        return item

    async def _next(self, feed: Feed, timeout: float) -> Item | None:
        item: Item | None = None
        while item is None and (messages := await feed.receive(timeout)):
            item = await self._received(feed, messages[0])
        return item

    def adjust(self) -> None:
        """Fetch nothing for what was settled."""
        for feed in self._feeds.values():
            if not feed.lock.locked():
                feed.allow(feed.held)

    def _look(self, feed: Feed) -> None:
        self._timers.pop(feed.queue, None)
        task = asyncio.get_running_loop().create_task(self._leave(feed))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _leave(self, feed: Feed) -> None:
        """Let others have what came when nobody asked any more, and leave the queue when nothing of it is in hand."""
        async with feed.lock:
            with suppress(BrokerError):
                while messages := await feed.receive(0):
                    for message in messages:
                        await message.release()
            if feed.held:
                self._timers[feed.queue] = asyncio.get_running_loop().call_later(LINGER, self._look, feed)
                return
            if self._feeds.get(feed.queue) is feed:
                del self._feeds[feed.queue]
            with suppress(BrokerError):
                await feed.close()

    def stop(self) -> None:
        """Ask for nothing more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
