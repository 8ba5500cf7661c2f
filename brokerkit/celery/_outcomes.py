"""How messages end that a channel has read: passed on in order, many at a time, by one task."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from typing import Final, Literal, TypeAlias

from msgspec import structs

from .._redact import error_text
from .._tasks import Hosted
from ..errors import BrokerError
from ..policy import MAX_BODY, MAX_DELAY
from ._envelope import level, pack, redelivered, unseal
from ._item import PUBLISHED, Item, published

logger = logging.getLogger("brokerkit")

Kind: TypeAlias = Literal["ack", "reject", "requeue", "release"]
REJECTED: Final = "rejected by its consumer"


class Outcomes:
    """Settles items.  What is added in one turn of the loop leaves in the next."""

    def __init__(self) -> None:
        self._items: deque[tuple[Kind, Item]] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._hosted = Hosted("brokerkit outcomes of Celery", self._main)

    async def open(self) -> None:
        """Begin, if that was not done before."""
        if self._hosted.task is None:
            await self._hosted.__aenter__()

    async def close(self) -> None:
        """End when everything is passed on."""
        self._hosted.stopping.set()
        self._stir()
        await self._hosted.__aexit__()

    def add(self, kind: Kind, item: Item) -> None:
        """Have *item* settled."""
        self._items.append((kind, item))
        self._stir()

    def _stir(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def settled(self) -> None:
        """Return when everything that was added is passed on."""
        task = self._hosted.task
        while self._items and task is not None and not task.done():
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle, task], return_when=asyncio.FIRST_COMPLETED)

    async def _main(self, started: asyncio.Future[None]) -> None:
        loop, items = asyncio.get_running_loop(), self._items
        started.set_result(None)
        while True:
            while items:
                await self._settle(*items[0])
                items.popleft()
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
            if self._hosted.stopping.is_set():
                return
            self._wake = loop.create_future()
            await self._wake

    async def _settle(self, kind: Kind, item: Item) -> None:
        message = item.message
        if message is None:
            return
        if item.also is not None:
            for other in item.also:
                with suppress(BrokerError):
                    await (other.release() if kind == "release" else other.ack())
        try:
            if kind == "ack":
                await message.ack()
            elif kind == "requeue":
                await copy(item, 0.0, again=True)
            elif kind == "reject":
                await message.reject(REJECTED)
            else:
                await message.release()
        except BrokerError as error:
            # The connection is gone, or the message is another one's by now: it comes again.
            logger.debug("queue %s: %s was not settled: %s", item.queue, message.id, error_text(error))
            if message.outcome is None:
                with suppress(BrokerError):
                    await message.release()
        except Exception:
            logger.exception("queue %s: %s was not settled", item.queue, message.id)


async def copy(item: Item, delay: float, *, again: bool) -> None:
    """Put a copy of *item* into its queue, for *delay* seconds, and acknowledge it: both or none, where that can be.

    With *again* the copy says that it was delivered before.
    """
    message, feed = item.message, item.feed
    assert message is not None
    assert feed is not None
    body = message.body
    if again:
        payload = unseal(body)  # the consumer may have changed the one that it got
        redelivered(payload)
        marked = pack(payload)
        if len(marked) <= MAX_BODY:  # what a service has published may have no room for the mark
            body = marked
    priority = min(level(item.payload["properties"].get("priority")), feed.address.priorities - 1)
    headers = {PUBLISHED: repr(published(message))}
    wait = min(max(0.0, delay), MAX_DELAY)
    await message.publish(feed.address, body, id=message.id, headers=headers, delay=wait, priority=priority)
    expires = message._item.record.expires
    if expires is not None and message._staged:  # by the server's clock, which a number of seconds would not keep to
        message._staged[-1] = structs.replace(message._staged[-1], expires=expires)
    await message.ack()
