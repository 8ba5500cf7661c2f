"""Reading a topic from now on, for as long as it is of use, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio

from .._redact import error_text
from .._subscription import Subscription
from .._tasks import Hosted
from ..address import Topic
from ..broker import Broker
from ..errors import BrokerError, Closed, PositionLost
from ..message import Message
from ..policy import Start, backoff

logger = logging.getLogger("brokerkit")

AHEAD = 1000
"""Messages that are fetched before they are taken."""
LONGEST_WAIT = 10.0


class Follower:
    """Gives what is published to *topic* to *take*, from the moment on in which `open` has returned.

    With *begin* everything that was stored before comes first, and *read* is awaited behind it; when reading has to begin
    anew, *begin* is called, and everything comes again.
    """

    def __init__(
        self,
        broker: Broker,
        topic: Topic[bytes],
        take: Callable[[Sequence[Message[bytes]]], None],
        *,
        begin: Callable[[], None] | None = None,
        read: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._broker = broker
        self._topic = topic
        self._take = take
        self._begin = begin
        self._read = read
        self._messages: Subscription[bytes] | None = None
        """What it reads, when it has read what was stored before."""
        self._hosted = Hosted(f"brokerkit follower of {topic.name}", self._main)

    @property
    def follows(self) -> bool:
        """Whether it was opened and has not ended."""
        return self._hosted.task is not None and not self._hosted.task.done()

    @property
    def current(self) -> bool:
        """Whether it reads right now: neither is its connection lost, nor does it wait to begin anew."""
        return self.follows and self._messages is not None and not self._messages.intake.problems()

    async def open(self) -> None:
        """Return when whatever is published from now on is going to be taken."""
        await self._hosted.__aenter__()

    async def close(self) -> None:
        """Take nothing more."""
        await self._hosted.__aexit__()

    async def _main(self, started: asyncio.Future[None]) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._run, started)
            await self._hosted.stopping.wait()
            group.cancel_scope.cancel()

    async def _run(self, started: asyncio.Future[None]) -> None:
        failures = 0
        while True:
            try:
                async with self._broker.subscribe(self._topic, prefetch=AHEAD, on_invalid="skip") as messages:
                    if self._begin is not None:
                        await self._whole(self._begin)
                    if not started.done():
                        started.set_result(None)
                    failures = 0
                    self._messages = messages
                    while True:
                        self._give(await messages.receive(limit=AHEAD))
            except PositionLost as error:
                self._messages = None
                logger.warning("%s: messages were lost: %s", self._topic.name, error_text(error))
            except Closed:
                return
            except BrokerError as error:
                if not started.done():
                    raise
                self._messages = None
                failures += 1
                wait = backoff(failures, longest=LONGEST_WAIT)
                text = "%s: stopped reading, again in %.3g s: %s"
                logger.warning(text, self._topic.name, wait, error_text(error))
                await asyncio.sleep(wait)

    async def _whole(self, begin: Callable[[], None]) -> None:
        begin()
        # What is published meanwhile comes twice, in the same order.
        await self.read_stored()
        if self._read is not None:
            await self._read()

    async def read_stored(self) -> None:
        """Have what is stored now taken; return when it is."""
        async with self._broker.subscribe(
            self._topic, start=Start.EARLIEST, until_end=True, prefetch=AHEAD, on_invalid="skip"
        ) as stored:
            while got := await stored.receive(limit=AHEAD):
                self._give(got)

    def _give(self, messages: Sequence[Message[bytes]]) -> None:
        try:
            self._take(messages)
        except Exception:
            logger.exception("%s: %d messages are passed over", self._topic.name, len(messages))
