"""Everything but publishing and consuming: what exists, what is in it, and what moves or goes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import msgspec

from ... import clock
from ...address import Address, AnyDeadLetters, AnyQueue, AnyTopic, DeadLetters, Queue, Topic, internal, letters_of
from ...driver import Backlog, Source, StoredRecord
from ...errors import AuthorizationError, BrokerError, CapabilityError, ConfigError, NotFound
from ...policy import Start
from ._browse import Places, browse_topic
from ._cluster import loop_time, time_left
from ._consumer import group_of
from ._context import Context
from ._coordinator import members, store_start
from ._create import create
from ._letters import TIMEOUT, Letters, gone_log, letters_in
from ._migrate import migrate
from ._offsets import resolve
from ._progress import Ages, progress
from ._queue_admin import QueueAdmin
from ._remove import delete_groups, delete_topics, groups_like, topics_like
from ._share_group import forget
from ._tiers import tiered
from ._topic_settings import retention_of


class Admin:
    """What a driver does for an administrator."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cluster = context.cluster
        self._places = Places()
        self._letters: dict[str, Letters] = {}
        self._ages = Ages(context)
        self._queues = QueueAdmin(context, self._ages)

    def _named(self, error: NotFound, address: Address) -> NotFound:
        """Return *error* with what to do."""
        if type(error.__cause__) is NotFound:
            return error
        hint = "" if ".." in address.name else "; declare it"
        named = NotFound(f"{address!r} does not exist on {self._context.settings.shown}{hint}")
        named.__cause__ = error
        return named

    # ------------------------------------------------------------------ what exists

    async def declare(self, address: Address) -> None:
        """Create *address* with its settings if it is missing."""
        if isinstance(address, Queue):
            await self._queues.declare(address, loop_time() + TIMEOUT)
        else:
            await create(self._cluster, address, timeout=TIMEOUT)

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist, None if *address* is missing."""
        until = loop_time() + TIMEOUT
        try:
            info = await self._cluster.topic(address.name, timeout=TIMEOUT, fresh=True)
        except NotFound:
            return None
        if isinstance(address, Queue):
            return await self._queues.describe(address, until)
        if not isinstance(address, Topic):
            return {}
        topic: AnyTopic = address
        found: dict[str, object] = {"partitions": len(info.partitions)}
        if topic.owned:
            shown = self._context.settings.shown
            kept = await retention_of(self._cluster, topic, shown, timeout=time_left(until))
            found["retention"] = _retention(topic, kept)
        return found

    async def delete(self, address: Address, group: str | None) -> None:
        """Remove *address* with all that is derived from it, or only what belongs to *group*."""
        if group is not None and not isinstance(address, Topic):
            raise ConfigError(f"{address!r} has no groups; only topics do")
        until = loop_time() + TIMEOUT
        if isinstance(address, DeadLetters):
            await delete_topics(self._cluster, [address.name, gone_log(address)], timeout=TIMEOUT)
            return
        if group is not None:
            await self._delete_group(address, group, until)
            return
        beginning = address.name + ".."
        names = await topics_like(self._cluster, beginning, timeout=time_left(until))
        groups = await groups_like(self._cluster, beginning, timeout=time_left(until))
        await delete_topics(self._cluster, [address.name, *names], timeout=time_left(until))
        # What a group keeps of a topic goes with the topic; what is left of it is its name, while members live.
        if isinstance(address, Queue):
            groups = [address.name, *groups]
        failed = await delete_groups(self._cluster, groups, timeout=time_left(until))
        if isinstance(error := failed.get(address.name), AuthorizationError):
            raise error
        if isinstance(address, Queue) and error is None:
            await forget(self._cluster, address.name, timeout=time_left(until))

    async def _delete_group(self, address: Address, group: str, until: float) -> None:
        own = internal(address.name, group)
        again = internal(own, "again")
        # A group with members is refused before anything is gone.
        for name in (own, again):
            failed = await delete_groups(self._cluster, [name], timeout=time_left(until))
            if name in failed:
                raise failed[name]
        names = await topics_like(self._cluster, own + "..", timeout=time_left(until))
        if names:
            await delete_topics(self._cluster, names, timeout=time_left(until))

    # ------------------------------------------------------------------ what is in it

    async def browse(
        self, address: Address, *, limit: int, start: Start | None, after: str | None
    ) -> Sequence[StoredRecord]:
        """Return up to *limit* stored records behind position *after*, the oldest first."""
        if not isinstance(address, Topic) and start not in {None, Start.EARLIEST}:
            raise CapabilityError(f"start is for topics; {address!r} on kafka is browsed from its oldest message")
        until = loop_time() + TIMEOUT
        try:
            if isinstance(address, Topic):
                return await browse_topic(self._cluster, address, limit, start, after, self._places, until)
            if isinstance(address, Queue):
                return await self._queues.browse(address, limit, after, until)
            return await self._of(address).browse(limit, after)
        except NotFound as error:
            if isinstance(address, DeadLetters) and await self._exists(address.of):
                return []
            raise self._named(error, address) from error.__cause__

    def _of(self, address: AnyDeadLetters) -> Letters:
        return letters_in(self._letters, self._context, address)

    async def _exists(self, address: Address) -> bool:
        try:
            await self._cluster.topic(address.name, timeout=TIMEOUT)
        except NotFound:
            return False
        return True

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do."""
        address = source.address
        until = loop_time() + TIMEOUT
        try:
            if isinstance(address, DeadLetters):
                return await self._backlog_of_letters(address, until)
            if isinstance(address, Topic) and source.group is None:
                await self._cluster.topic(address.name, timeout=TIMEOUT, fresh=True)
                return Backlog()
            if isinstance(address, Queue):
                if not tiered(address):
                    return await self._queues.backlog(address, until)
                left, dead = await asyncio.gather(
                    self._queues.backlog(address, until), self._count(address, None, until)
                )
                return msgspec.structs.replace(left, dead=dead)
            found, dead = await asyncio.gather(
                progress(self._context, address, group_of(source) or "", source.start, until),
                self._count(address, source.group, until),
            )
            oldest = await self._ages.oldest(address, found.info, found.oldest(), found.bounds, until)
            return Backlog(
                waiting=found.waiting,
                in_flight=found.in_flight,
                delayed=0,
                dead=dead,
                oldest_age=None if oldest is None else max(0.0, clock.current().time() - oldest),
            )
        except NotFound as error:
            raise self._named(error, address) from error.__cause__

    async def foreign_backlog(self, topic: AnyTopic, group: str, timeout: float) -> int:
        """Return how many records of *topic* the group that any client calls *group* has not done."""
        found = await progress(self._context, topic, group, Start.EARLIEST, loop_time() + timeout)
        return found.waiting

    async def _count(self, address: AnyTopic | AnyQueue, group: str | None, until: float) -> int | None:
        """Return how many dead letters *group*, or a queue, has."""
        letters = self._of(letters_of(address, group))
        try:
            await letters.look(until)
        except NotFound:
            return 0
        return letters.count

    async def _backlog_of_letters(self, address: AnyDeadLetters, until: float) -> Backlog:
        letters = self._of(address)
        try:
            info = await letters.look(until)
        except NotFound:
            if not await self._exists(address.of):
                raise
            return Backlog(waiting=0, in_flight=0, delayed=0)
        oldest = await letters.oldest(info, until)
        age = None if oldest is None else max(0.0, clock.current().time() - oldest)
        return Backlog(waiting=letters.count, in_flight=0, delayed=0, oldest_age=age)

    # ------------------------------------------------------------------ what moves or goes

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all that waits and return how many."""
        try:
            if isinstance(address, DeadLetters):
                return await self._of(address).purge()
            if isinstance(address, Queue) and tiered(address):
                return await self._queues.purge(address, loop_time() + TIMEOUT)
        except NotFound as error:
            if isinstance(address, DeadLetters) and await self._exists(address.of):
                return 0
            raise self._named(error, address) from error.__cause__
        raise CapabilityError(f"{address!r} on kafka cannot be purged; its dead letters can")

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*; one result each."""
        if to.name == letters.of.name and isinstance(letters.of, Topic):
            raise CapabilityError(f"letters of {letters.of!r} go to their group's private queue: others read the topic")
        if tiered(to):
            try:
                await self._cluster.topic(to.name, timeout=TIMEOUT)
            except NotFound as error:
                raise self._named(error, to) from error.__cause__
        try:
            return await self._of(letters).redrive(positions, to)
        except NotFound as error:
            raise self._named(error, letters) from error.__cause__

    async def migrate(self, queue: AnyQueue) -> None:
        """Move *queue* from a classic group to a share group."""
        try:
            await migrate(self._context, queue, timeout=TIMEOUT)
        except NotFound as error:
            raise self._named(error, queue) from error.__cause__

    async def seek(self, source: Source) -> None:
        """Move the position of a group without members, or store that of a new one."""
        topic, group = source.address, source.group
        if not isinstance(topic, Topic):
            raise ConfigError(f"{topic!r} has no groups; only topics do")
        if group is None:
            raise ConfigError("only a group has a position")
        until = loop_time() + TIMEOUT
        id = internal(topic.name, group)
        try:
            await self._cluster.topic(topic.name, timeout=TIMEOUT, fresh=True)
        except NotFound as error:
            raise self._named(error, topic) from error.__cause__
        offsets = await resolve(self._cluster, topic, source.start, timeout=time_left(until))
        places = {number: (offset, "") for number, offset in enumerate(offsets)}
        if not await store_start(self._cluster, id, topic.name, places, time_left(until)):
            try:
                count = len(await members(self._cluster, id, time_left(until)))
            except AuthorizationError:
                count = 0
            raise ConfigError(
                f"group {group!r} of {topic.name} has {count or 'some'} live members; stop them first"
                " (one that died counts until its session has ended)"
            )


def _retention(topic: AnyTopic, kept: int) -> float | None:
    """Return how long a topic keeps its records, in the words of its address where they mean the same."""
    wanted = topic.retention
    if kept < 0:
        return wanted if wanted == math.inf else None
    return wanted if wanted is not None and wanted < math.inf and round(wanted * 1000) == kept else kept / 1000
