"""The two kinds of consumer: of a queue, and of a topic for a group or for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...driver import Delivery, Revoked, Source
from ...errors import CapabilityError
from ...events import Expired, Listener, PartitionPaused, PartitionResumed
from ...policy import Start
from ._consumer import Consumer, Link
from ._group import Group, Member
from ._queue import QueueStore
from ._server import topic_of
from ._stored import Lease, Session

PATIENCE = 60.0
"""Least seconds that a partition waits for what runs before it moves: a member that lives is not hurried."""


class QueueConsumer(Consumer):
    """Takes records of a queue, in competition with others."""

    _store: QueueStore

    def __init__(self, link: Link, source: Source, prefetch: int, revoked: Revoked, emit: Listener) -> None:
        super().__init__(link, prefetch, revoked)
        self._source = source
        self._emit = emit
        self.session = Session(self)
        self._held = self.session.held

    def __repr__(self) -> str:
        return f"<QueueConsumer {self._source.address.name} in_flight={len(self._held)}>"

    def _join(self) -> None:
        address = self._source.address
        assert address.kind == "queue"
        if self._source.until_end:
            raise CapabilityError(f"until_end is for topics; {address!r} on memory has no end")
        self._store = self._link.server.queue(address, create=True)
        self._store.join(self.session)

    def left(self) -> None:
        """Hand back what is held."""
        self._store.leave(self.session)

    def suspend(self) -> None:
        """Let what is held be taken away after the lease."""
        self._store.suspend(self.session)

    def resume(self) -> None:
        """Keep what is held."""
        self._store.resume(self.session)

    def _take(self, limit: int) -> Sequence[Delivery]:
        room = self._prefetch - len(self._held)
        room = min(room, limit)
        return self._store.take(self.session, room, self._expired)

    def _expired(self, count: int) -> None:
        self._emit(Expired(address=self._source.address.name, count=count))

    def _enlist(self) -> None:
        if not self.session.blocked:
            self._store.waiters[self.session] = None

    def _delist(self) -> None:
        self._store.waiters.pop(self.session, None)

    def _pass_on(self) -> None:
        self._store.pass_on(self.session)

    def _settled(self, leases: list[Lease]) -> None:
        self._store.settled(len(leases))

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
        self, link: Link, source: Source, prefetch: int, revoked: Revoked, emit: Listener, survives: float
    ) -> None:
        super().__init__(link, prefetch, revoked)
        self._source = source
        self._emit = emit
        self.session = Member(self, survives, None)
        self._held = self.session.held

    def __repr__(self) -> str:
        name, partitions = self._source.address.name, sorted(self.session.claims)
        return f"<TopicConsumer {name} group={self._source.group} {partitions=} in_flight={len(self._held)}>"

    def _join(self) -> None:
        server = self._link.server
        self._group = server.reader(self._source)
        if self._source.until_end:
            self.session.ends = server.topic(topic_of(self._source)).resolve(Start.LATEST)
        self._group.join(self.session)

    def left(self) -> None:
        """Hand back what is held."""
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
        if self._group.name is not None:
            return None
        claims = self.session.claims
        return self._group.topic.cursor([claims[index].tracker.high for index in sorted(claims)])

    def _take(self, limit: int) -> Sequence[Delivery]:
        topic = self._group.topic
        if topic.trim_at < math.inf:
            topic.refresh()
        return self.session.take(limit, self._prefetch - len(self._held), self._stood)

    def _stood(self, partition: int, stands: bool) -> None:
        make = PartitionPaused if stands else PartitionResumed
        self._emit(make(address=self._source.address.name, group=self._source.group, partition=partition))

    def _enlist(self) -> None:
        self.session.waits = True

    def _delist(self) -> None:
        self.session.waits = False

    def _pass_on(self) -> None:
        """Nobody else may take what this member owns."""

    def _settled(self, leases: list[Lease]) -> None:
        self.session.settled(leases, self._stood)

    def _release(self, deliveries: Sequence[Delivery]) -> None:
        self.session.hand_back(deliveries)

    def _hold(self, delivery: Delivery, attempts: int) -> None:
        self.session.hold(delivery.token, attempts)

    def _patience(self) -> float:
        return max(self.session.survives, PATIENCE)
