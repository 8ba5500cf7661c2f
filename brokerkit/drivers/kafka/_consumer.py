"""`TopicConsumer`: reads a topic as a member of a group, or ephemerally, which is the same without a position to store.

The private queue of a group, where redriven letters go, is read in the same way, with the queue's own name as the group.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import anyio

from ...address import AnyQueue, AnyTopic, Queue, internal
from ...driver import Revoked, Source
from ...errors import AuthorizationError, BrokerError, CapabilityError, NotFound
from ...policy import Start
from .._log import Tracker
from ._claim import lease_of
from ._cluster import PAUSE
from ._commit import Commits
from ._context import Context
from ._coordinator import committed, store_start
from ._copies import Copies
from ._create import create
from ._fetch import Fetcher
from ._group import Group
from ._offsets import LATEST, cursor, offsets_at, resolve
from ._owner import Owner
from ._reader import END_LOOKS
from ._tiers import tiered
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

LEAVING: Final = 5.0
"""Most seconds that leaving waits for the cluster."""
READY: Final = 2.0
"""Most seconds that entering waits for the leaders of what is in hand: one that has none is read later."""
ROOM: Final = 1.25
"""Sessions that a consumer of a queue waits until another makes room for it, if that is gone already."""
_LOOKS: Final = 5
"""How often a new group's start is looked at again, if others are joining at the same time."""


class TopicConsumer(Owner):
    """A reader of a topic, and its context manager."""

    def __init__(
        self, context: Context, address: AnyTopic | AnyQueue, source: Source, prefetch: int, revoked: Revoked
    ) -> None:
        super().__init__(context, address, source, prefetch, revoked)
        self._group_id = group_of(source)

    @property
    def group_id(self) -> str | None:
        """What Kafka calls its group."""
        return self._group_id

    @property
    def cursor(self) -> str | None:
        """Where an ephemeral reader goes on; None for a group, and where there is no topic yet."""
        if self._group_id is not None or not self._claims:
            return None
        places = [self._claims[number].tracker.high for number in range(len(self._claims))]
        for delivery in self._fetched:  # not received yet
            lease = lease_of(delivery)
            places[lease.claim.number] = min(places[lease.claim.number], lease.offset)
        for number, claim in self._claims.items():
            if claim.order:  # released
                places[number] = min(places[number], claim.order[0])
        return cursor(self._name, places, max(claim.ms for claim in self._claims.values()))

    # ------------------------------------------------------------------ entering

    async def _enter(self) -> None:
        """Begin, with the start stored."""
        self._entered = True
        timeout = self._context.settings.timeout
        try:
            info = await self._cluster.topic(self._name, timeout=timeout)
        except NotFound as error:
            if ".." not in self._name:
                text = f"{self._address!r} does not exist on {self._cluster.settings.shown}; declare it"
                raise NotFound(text) from error.__cause__
            if self._source.until_end:
                self._ends, self._others_ended = [], True
                return
            if self._group_id is not None or not await self._create(timeout):
                if self._telling is not None:
                    self._telling.start_soon(self._run, self._appear)
                return
            info = await self._cluster.topic(self._name, timeout=timeout)
        await self._begin(info, self._source.start)
        if isinstance(self._address, Queue) and tiered(self._address):
            await self._find_room(len(info.partitions))
        with anyio.move_on_after(READY):
            await self._first_answers()

    async def _create(self, timeout: float) -> bool:
        """Create the derived topic that is to be read from now on, as replies are; return whether that is allowed."""
        try:
            await create(self._cluster, self._address, timeout=timeout)
        except AuthorizationError:
            return False  # it is seen a moment after others have created it
        return True

    async def _find_room(self, partitions: int) -> None:
        """Refuse to be one of more consumers than partitions; one that has died may count for as long as its session."""
        group, loop = self._group, asyncio.get_running_loop()
        assert group is not None
        end = loop.time() + ROOM * self._session
        while group._hands.spare:
            if loop.time() >= end:
                raise CapabilityError(
                    f"{self._address!r} on kafka has as many consumers as its {partitions} partitions already: its classic group"
                    " takes no more (a share group does, on brokers from 4.2.1 on; option queue_partitions when it is declared)"
                )
            await asyncio.sleep(PAUSE)

    async def _first_answers(self) -> None:
        """Wait until the leaders of all partitions in hand have answered: what may not be read is refused on entering."""
        assert self._fetcher is not None
        while any(self._fetcher.end(number) is None for number in self._claims):
            self._arrival.clear()
            await self._arrival.wait()

    async def _appear(self) -> None:
        """Wait until a derived topic is created; everything in it is read."""
        name, cluster = self._name, self._cluster
        changed = asyncio.Event()
        cluster.watchers.add(changed.set)
        cluster.watch(name)
        try:
            while (info := cluster.known(name)) is None:
                await changed.wait()
                changed.clear()
        finally:
            cluster.watchers.discard(changed.set)
            cluster.unwatch(name)
        await self._begin(info, Start.EARLIEST)

    async def _begin(self, info: TopicInfo, start: Start) -> None:
        """Read the partitions of *info*, or join the group."""
        if self._source.until_end:
            everywhere = dict.fromkeys(range(len(info.partitions)), LATEST)
            found = await offsets_at(self._cluster, info, everywhere, timeout=self._context.settings.timeout)
            self._ends = [found[number][0] for number in range(len(info.partitions))]
        self._fetcher = Fetcher(self._cluster, self._name, self)
        if isinstance(self._address, Queue):
            self._fetcher.purged = self.purged
        if self._group_id is None:
            await self._begin_alone(start)
        else:
            await self._store_start(self._group_id, info, start)
            await self._join(self._group_id, self._fetcher)

    async def _begin_alone(self, start: Start) -> None:
        assert self._fetcher is not None
        offsets = await resolve(self._cluster, self._topic(), start, timeout=self._context.settings.timeout)
        for number, offset in enumerate(offsets):
            self._claim(number, offset, "")
        self._cluster.watchers.add(self._widened)
        self._spawn(self._fetcher.run)

    def _widened(self) -> None:
        """Read partitions that were added since, from their beginning."""
        info = self._cluster.known(self._name)
        if info is not None and self._entered:
            for number in range(len(self._claims), len(info.partitions)):
                self._claim(number, 0, "").anew = True

    def _topic(self) -> AnyTopic:
        address: Any = self._address  # only its name counts
        topic: AnyTopic = address
        return topic

    async def _store_start(self, group: str, info: TopicInfo, start: Start) -> None:
        """See to it that the group has a position: a new one's start is stored before it joins."""
        timeout = self._context.settings.timeout
        for _ in range(_LOOKS):
            known = await committed(self._cluster, group, self._name, range(len(info.partitions)), timeout)
            if any(place is not None for place in known.values()):
                return  # partitions without one were added since: they are read from their beginning
            offsets = await resolve(self._cluster, self._topic(), start, timeout=timeout)
            places = {number: (offset, "") for number, offset in enumerate(offsets)}
            if await store_start(self._cluster, group, self._name, places, timeout):
                return
            await asyncio.sleep(PAUSE)

    async def _join(self, group_id: str, fetcher: Fetcher) -> None:
        context = self._context
        self._group = group = Group(
            self._cluster, group_id, self._name, self, session=self._session, instance=context.settings.instance
        )
        timeout = context.settings.timeout
        self._commits = Commits(group_id, group, timeout, self._spawn, self._refused)
        self._copies = Copies(context.outboxes, self._sure, self._held, timeout, self._spawn, self._copied)
        self._spawn(fetcher.run)
        self._spawn(group.run)
        await group.join()

    # ------------------------------------------------------------------ leaving

    async def _leave(self) -> None:
        """Store what is done, hand back what is not, and leave the group."""
        group, commits, copies = self._group, self._commits, self._copies
        if group is None or commits is None or copies is None:
            return
        with anyio.move_on_after(min(LEAVING, self._session), shield=True):
            with anyio.move_on_after(min(LEAVING, self._session) / 2):
                if under_way := copies.under_way(lambda lease: not lease.claim.gone):
                    await asyncio.wait(under_way)
            self._hand_back(list(self._held.values()))
            await self._store(list(self._claims.values()), min(LEAVING, self._session) / 2)
            try:
                await group.leave(timeout=min(LEAVING, self._session) / 2)
            except BrokerError as error:
                logger.info("%s: leaving group %s: %s", self._name, self._group_id, error)

    def _close(self) -> None:
        self._entered = False
        self._cluster.watchers.discard(self._widened)
        if self._timer is not None:
            self._timer.cancel()
        self._lone.close()
        for claim in self._claims.values():
            claim.gone = True
        if self._copies is not None:
            self._copies.abort()
        if self._commits is not None:
            self._commits.close()
        self._held.clear()
        self._fetched.clear()
        self._news.clear()
        self._wake()

    async def _look_at_others(self) -> bool:
        """Return whether the other members of the group are at the end."""
        now = asyncio.get_running_loop().time()
        ends, group = self._ends, self._group_id
        if ends is None or group is None or now - self._looked < END_LOOKS:
            return False
        self._looked = now
        others = [number for number in range(len(ends)) if number not in self._claims]
        try:
            places = await committed(self._cluster, group, self._name, others, self._context.settings.timeout)
        except BrokerError as error:
            logger.info("%s: how far others are is not known: %s", self._name, error)
            return False
        for number in others:
            base, note = places.get(number) or (0, "")
            if Tracker.decode(base, note).next < ends[number]:
                return False
        self._others_ended = self._at_end() and all(n in others or n in self._claims for n in range(len(ends)))
        return self._others_ended


def purged(readers: Iterable[object], topic: str, starts: Mapping[int, int]) -> None:
    """Tell those of *readers* that read *topic* where its partitions begin by now: they hear it from brokers, but later."""
    for reader in readers:
        if isinstance(reader, TopicConsumer) and reader.topic == topic:
            for partition, start in starts.items():
                reader.purged(partition, start)


def group_of(source: Source) -> str | None:
    """Return what Kafka calls the group that reads *source*; None for an ephemeral reader."""
    name = source.address.name
    if isinstance(source.address, Queue):
        return name
    return None if source.group is None else internal(name, source.group)


def trackers(readers: Iterable[object], group_id: str) -> Callable[[], dict[int, Tracker]]:
    """Return what tells, when it is called, how far those of *readers* are that are members of *group_id*."""

    def own() -> dict[int, Tracker]:
        return {
            number: claim.tracker
            for reader in readers
            if isinstance(reader, TopicConsumer) and reader.group_id == group_id
            for number, claim in reader.claims.items()
        }

    return own
