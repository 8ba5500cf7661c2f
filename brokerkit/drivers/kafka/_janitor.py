"""Removing what is done from the disk: queues keep nothing by time.

Only what lies below the position that the cluster itself keeps is removed.  A share group's is one write behind what it has
done, never ahead, and above it nothing may be removed: a broker whose log begins inside a producer's batch, above the
position, hands out nothing of that partition any more.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Final

from ...address import AnyQueue
from ...errors import AuthorizationError, BrokerError, NotFound
from ._context import Context
from ._coordinator import committed
from ._cut import cut
from ._engine import engine_of
from ._look import bounds
from ._share_group import places
from ._tell import Teller
from ._tiers import tiered, waiting_for
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

EVERY: Final = 3600.0
"""Seconds between looks."""
FIRST: Final = 2.0
"""Most seconds until the first one: entering many queues at once is work enough."""
_AGAIN: Final = 60.0
"""The same after one that failed."""
_RANDOM = random.Random()


class Janitor:
    """Keeps the topics of one queue small, while this process consumes it."""

    def __init__(self, context: Context, queue: AnyQueue) -> None:
        self._cluster = context.cluster
        self._timeout = context.settings.timeout
        self._queue = queue
        self._teller = Teller(context.emit, queue.name, "keeping")
        self.looked = asyncio.get_running_loop().time()
        """When it looked for the last time, or began, by the loop's clock."""

    def __repr__(self) -> str:
        return f"<Janitor {self._queue.name}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why the topics grow, if they do."""
        return self._teller.problem

    async def run(self) -> None:
        """Look soon and every hour, until cancelled."""
        await asyncio.sleep(FIRST * _RANDOM.random())
        while True:
            await self.look()
            rest = EVERY if self.problem is None or isinstance(self.problem, AuthorizationError) else _AGAIN
            await asyncio.sleep(rest * (0.9 + 0.2 * _RANDOM.random()))

    async def look(self) -> None:
        """Remove what is done, and tell if that fails."""
        problem = await self.clear()
        if problem is None:
            self._teller.works()
        else:
            self._teller.failed(problem)

    async def clear(self) -> BrokerError | None:
        """Remove what is done; return why some of it is not removed."""
        self.looked = asyncio.get_running_loop().time()
        problem: BrokerError | None = None
        for queue in (self._queue, waiting_for(self._queue)) if tiered(self._queue) else (self._queue,):
            try:
                await self._clear(queue)
            except NotFound:
                pass  # nothing was stored there, or it was deleted
            except BrokerError as error:
                problem = problem or error
            except Exception as error:
                logger.exception("%r: clearing %s failed", self, queue.name)
                problem = problem or BrokerError(f"the driver failed: {type(error).__name__}")
        return problem

    async def _clear(self, queue: AnyQueue) -> None:
        cluster, timeout = self._cluster, self._timeout
        info = await cluster.topic(queue.name, timeout=timeout)
        done = await self._done(queue, info)
        if not done:
            return
        # The limits are asked for last: a topic that was deleted and made again meanwhile ends before what was done of it.
        limits = await bounds(cluster, info, done, timeout=timeout)
        below = {number: offset for number, offset in done.items() if limits[number][0] < offset <= limits[number][1]}
        if not below:
            return
        try:
            await cut(cluster, info, below, timeout=timeout)
        except AuthorizationError as error:
            count = sum(offset - limits[number][0] for number, offset in below.items())
            named = AuthorizationError(f"{error}; topic {queue.name} keeps {count} records that are done, and grows")
            raise named from error.__cause__

    async def _done(self, queue: AnyQueue, info: TopicInfo) -> Mapping[int, int]:
        """Return below which offset of each partition everything is done, by what the cluster keeps."""
        numbers = range(len(info.partitions))
        engine = await engine_of(self._cluster, queue.name, timeout=self._timeout) if tiered(queue) else "classic"
        if engine == "share":
            found = await places(self._cluster, queue.name, info.name, numbers, timeout=self._timeout)
            return {number: place.start for number, place in found.items() if place.start > 0}
        if engine is None:
            return {}
        stored = await committed(self._cluster, queue.name, info.name, numbers, self._timeout)
        return {number: place[0] for number, place in stored.items() if place is not None}
