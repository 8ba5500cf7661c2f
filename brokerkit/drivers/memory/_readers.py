"""The two kinds of consumer: of a queue, and of a topic for a group or for itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ...address import AnyQueue, AnyTopic
from ...driver import Delivery, Revoked, Source
from ...errors import CapabilityError
from ...events import Expired, Listener, PartitionPaused, PartitionResumed
from ...policy import Start
from ._consumer import Consumer, Link, unheld
from ._group import Group, Member
from ._queue import QueueStore
from ._stored import Session, lease_of

PATIENCE = 60.0
"""Least seconds that a partition waits for what runs before it moves: a member that lives is not hurried."""


class QueueConsumer(Consumer):
    """Takes records of a queue, in competition with others."""

    _store: QueueStore

    def __init__(
        self, link: Link, queue: AnyQueue, source: Source, prefetch: int, revoked: Revoked, emit: Listener
    ) -> None:
        super().__init__(link, revoked)
        self._queue = queue
        self._until_end = source.until_end
        self._emit = emit
        self._session = Session(self, prefetch)
        self._held = self._session.held

    def __repr__(self) -> str:
        return f"<QueueConsumer {self._queue.name} in_flight={len(self._held)}>"

    def _join(self) -> None:
        if self._until_end:
            raise CapabilityError(f"until_end is for topics; {self._queue!r} on memory has no end")
        self._store = store = self._link.server.queue(self._queue, create=True)
        self._take = functools.partial(store.take, self._session, self._expired)
        self._settled = store.settled
        store.join(self._session)

    def left(self) -> None:
        """Hand back what is held."""
        self._store.leave(self._session)

    def suspend(self) -> None:
        """Let what is held be taken away after the lease."""
        self._store.suspend(self._session)

    def resume(self) -> None:
        """Keep what is held."""
        self._store.resume(self._session)

    def _expired(self, count: int) -> None:
        self._emit(Expired(address=self._queue.name, count=count))

    def _enlist(self) -> None:
        if not self._session.blocked:
            self._store.waiters[self._session] = None

    def _delist(self) -> None:
        self._store.waiters.pop(self._session, None)

    def _pass_on(self) -> None:
        self._store.pass_on(self._session)

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self._store.hand_back(self._session, deliveries, counted=False)

    def _hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep nothing: a queue's message is settled by its retry."""

    def _patience(self) -> float:
        return self._store.address.lease


class TopicConsumer(Consumer):
    """Reads partitions of a topic."""

    _group: Group

    def __init__(
        self,
        link: Link,
        topic: AnyTopic,
        source: Source,
        prefetch: int,
        revoked: Revoked,
        emit: Listener,
        survives: float,
    ) -> None:
        super().__init__(link, revoked)
        self._topic = topic
        self._source = source
        self._emit = emit
        self._session = self._member = Member(self, prefetch, survives)
        self._held = self._member.held

    def __repr__(self) -> str:
        partitions = sorted(self._member.claims)
        return (
            f"<TopicConsumer {self._topic.name} group={self._source.group} {partitions=} in_flight={len(self._held)}>"
        )

    def _join(self) -> None:
        server, member = self._link.server, self._member
        self._group = group = server.reader(self._source)
        if self._source.until_end:
            member.ends = server.topic(self._topic).resolve(Start.LATEST)
        self._take = functools.partial(member.take, group.topic, self._stood)
        self._settled = functools.partial(member.settled, self._stood)
        group.join(member)

    def left(self) -> None:
        """Hand back what is held and leave the group."""
        self._group.leave(self._member)

    def suspend(self) -> None:
        """Be out of the group after the session time."""
        if self._group.name is None and (self._link.faults.dead or not self._entered):
            self._group.leave(self._member)
        else:
            self._group.suspend(self._member)

    def resume(self) -> None:
        """Take part again, anew if others have taken over: then after the program has been told."""
        if self.losing:
            return
        if not self._group.resume(self._member):
            self._group.join(self._member)
        self.wake()

    @property
    def ended(self) -> bool:
        """Whether everything that was there on entering was handed out."""
        return self._member.ends is not None and self._group.ended(self._member.ends)

    @property
    def cursor(self) -> str | None:
        """Where an ephemeral reader goes on; None for a group."""
        group = self._group
        return None if group.name is not None else group.topic.cursor([tracker.high for tracker in group.trackers])

    def _stood(self, partition: int, stands: bool) -> None:
        make = PartitionPaused if stands else PartitionResumed
        self._emit(make(address=self._topic.name, group=self._source.group, partition=partition))

    def _enlist(self) -> None:
        self._member.waits = True

    def _delist(self) -> None:
        self._member.waits = False

    def _pass_on(self) -> None:
        """Nobody else may take what this member owns."""

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self._member.hand_back(deliveries)

    def _hold(self, delivery: Delivery, attempts: int) -> None:
        lease = delivery.token
        if lease in self._held:
            self._member.hold(lease_of(delivery), attempts)
        elif (error := unheld(lease)) is not None:
            raise error

    def _patience(self) -> float:
        return max(self._member.survives, PATIENCE)
