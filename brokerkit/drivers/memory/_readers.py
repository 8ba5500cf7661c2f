"""The two kinds of consumer: of a queue, and of a topic for a group or for itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ...address import AnyQueue, AnyTopic
from ...driver import Delivery, Revoked, Source
from ...errors import CapabilityError
from ...events import Expired, Listener, PartitionPaused, PartitionResumed
from ...policy import Start
from ._consumer import Consumer, Link
from ._group import Group, Member
from ._queue import QueueStore
from ._stored import Session

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
        self.session = Session(self, prefetch)
        self._held = self.session.held

    def __repr__(self) -> str:
        return f"<QueueConsumer {self._queue.name} in_flight={len(self._held)}>"

    def _join(self) -> None:
        if self._until_end:
            raise CapabilityError(f"until_end is for topics; {self._queue!r} on memory has no end")
        self._store = store = self._link.server.queue(self._queue, create=True)
        self._take = functools.partial(store.take, self.session, self._expired)
        self._settled = store.settled
        store.join(self.session)

    def left(self) -> None:
        """Hand back what is held."""
        self._store.leave(self.session)

    def suspend(self) -> None:
        """Let what is held be taken away after the lease."""
        self._store.suspend(self.session)

    def resume(self) -> None:
        """Keep what is held."""
        self._store.resume(self.session)

    def _expired(self, count: int) -> None:
        self._emit(Expired(address=self._queue.name, count=count))

    def _enlist(self) -> None:
        if not self.session.blocked:
            self._store.waiters[self.session] = None

    def _delist(self) -> None:
        self._store.waiters.pop(self.session, None)

    def _pass_on(self) -> None:
        self._store.pass_on(self.session)

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self._store.hand_back(self.session, deliveries, counted=False)

    def _hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep nothing: a queue's message is settled by its retry."""

    def _patience(self) -> float:
        return self._store.address.lease


class TopicConsumer(Consumer):
    """Reads partitions of a topic."""

    session: Member
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
        self.session = Member(self, prefetch, survives)
        self._held = self.session.held

    def __repr__(self) -> str:
        partitions = sorted(self.session.claims)
        return (
            f"<TopicConsumer {self._topic.name} group={self._source.group} {partitions=} in_flight={len(self._held)}>"
        )

    def _join(self) -> None:
        server, session = self._link.server, self.session
        self._group = group = server.reader(self._source)
        if self._source.until_end:
            session.ends = server.topic(self._topic).resolve(Start.LATEST)
        self._take = functools.partial(session.take, group.topic, self._stood)
        self._settled = functools.partial(session.settled, self._stood)
        group.join(session)

    def left(self) -> None:
        """Hand back what is held and leave the group."""
        self._group.leave(self.session)

    def suspend(self) -> None:
        """Be out of the group after the session time."""
        if self._group.name is None and (self._link.faults.dead or not self._entered):
            self._group.leave(self.session)
        else:
            self._group.suspend(self.session)

    def resume(self) -> None:
        """Take part again, anew if others have taken over."""
        if not self._group.resume(self.session):
            self._group.join(self.session)
        self.wake()

    @property
    def ended(self) -> bool:
        """Whether everything that was there on entering was handed out."""
        return self.session.ends is not None and self._group.ended(self.session.ends)

    @property
    def cursor(self) -> str | None:
        """Where an ephemeral reader goes on; None for a group."""
        group = self._group
        return None if group.name is not None else group.topic.cursor([tracker.high for tracker in group.trackers])

    def _stood(self, partition: int, stands: bool) -> None:
        make = PartitionPaused if stands else PartitionResumed
        self._emit(make(address=self._topic.name, group=self._source.group, partition=partition))

    def _enlist(self) -> None:
        self.session.waits = True

    def _delist(self) -> None:
        self.session.waits = False

    def _pass_on(self) -> None:
        """Nobody else may take what this member owns."""

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self.session.hand_back(deliveries)

    def _hold(self, delivery: Delivery, attempts: int) -> None:
        self.session.hold(delivery.token, attempts)

    def _patience(self) -> float:
        return max(self.session.survives, PATIENCE)
