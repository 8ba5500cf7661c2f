"""Groups of a topic: positions, members, and who reads which partition."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ...driver import Backlog, Delivery
from ...errors import NotFound, PositionLost
from ...policy import LOG_AHEAD, LONE_DELIVERY
from .._log import Tracker
from ._stored import Lease, Owner, Session, lease_of
from ._timers import Timers
from ._topic import Partition, TopicStore

Stood = Callable[[int, bool], None]
"""Told that a partition stands (True) or goes on (False)."""


class Claim:
    """One partition in the hands of one member, with the group's tracker of it."""

    __slots__ = ("end", "member", "partition", "queued", "revoking", "standing", "tracker")

    def __init__(self, member: Member, partition: Partition, tracker: Tracker, end: int | None) -> None:
        self.member = member
        self.partition = partition
        self.tracker = tracker
        self.end = end
        """Where an ``until_end`` source ends."""
        self.queued = False
        """Whether it is in `Member.pending`."""
        self.revoking = False
        """Whether it is about to move: nothing more is handed out."""
        self.standing = False
        """Whether it waits for its oldest unsettled record."""

    def arrived(self) -> None:
        """Look at this partition again: there may be something to hand out."""
        if not self.queued:
            self.queued = True
            self.member.pending.append(self)
        if self.member.waits:
            self.member.waits = False
            self.member.owner.wake()


class Member(Session):
    """One consumer of a topic, as a member of a group or as an ephemeral reader."""

    __slots__ = ("claims", "ends", "pending", "survives", "suspect", "waits")

    def __init__(self, owner: Owner, prefetch: int, survives: float) -> None:
        super().__init__(owner, prefetch)
        self.survives = survives
        """Seconds without a sign of life after which it is out."""
        self.ends: list[int] | None = None
        """The offsets at which an ``until_end`` source ends."""
        self.claims: dict[int, Claim] = {}
        self.pending: deque[Claim] = deque()
        """Claims that may have something to hand out."""
        self.suspect: Claim | None = None
        """A claim whose next record has to come alone, as soon as nothing is in hand."""
        self.waits = False
        """Whether the owner waits for a record."""

    def take(self, topic: TopicStore, stood: Stood, limit: int) -> list[Delivery]:
        """Hand out up to *limit* records of *topic*."""
        if topic.trim_at <= topic.timers.clock.time():
            topic.refresh()
        taken: list[Delivery] = []
        room = min(self.prefetch - len(self.held), limit)
        if room <= 0 or (self.lone.active and self.lone.holds_up()):
            self.blocked = True
            return taken
        self.blocked = False
        limit = room
        if self.suspect is not None:
            if self.held:
                self.blocked = True
                return taken
            claim, self.suspect = self.suspect, None
            if claim.queued:
                self.pending.remove(claim)
            claim.queued = True
            self.pending.appendleft(claim)
        pending = self.pending
        while pending and len(taken) < limit and self.suspect is None:
            claim = pending[0]
            done: bool | None
            if claim.revoking:
                done = True
            elif claim.tracker.fresh and not claim.partition.carried:
                done = self._take_run(claim, limit - len(taken), taken, stood)
            else:
                done = self._take_carefully(claim, limit, taken, stood)
            if self.lone.active or done is None:
                break
            if done:
                pending.popleft()
                claim.queued = False
            else:
                pending.rotate(-1)
        return taken

    def _take_run(self, claim: Claim, limit: int, taken: list[Delivery], stood: Stood) -> bool | None:
        """Hand out what was never handed out; return whether nothing is left for now, or None to stop here."""
        partition, tracker = claim.partition, claim.tracker
        entries, first, offset = partition.entries, partition.first, tracker.high
        if offset < first:
            return self._overtaken(claim, taken, stood)
        end = first + len(entries)
        if claim.end is not None and claim.end < end:
            end = claim.end
        if offset >= end:
            return True
        count = min(limit, end - offset, tracker.base + LOG_AHEAD - offset)
        if count > 0:
            tracker.hand_out_run(count)
            held, index = self.held, partition.index
            start = offset - first
            for record, position, _, _ in entries[start : start + count]:
                lease = Lease(offset, index)
                held[lease] = delivery = Delivery(record, lease, position, 1)
                taken.append(delivery)
                offset += 1
        if offset == end:
            return True
        if count < limit:
            self._stands(claim, stood)
            return True
        return False

    def _take_carefully(self, claim: Claim, limit: int, taken: list[Delivery], stood: Stood) -> bool | None:
        """Hand out record by record where some were handed out before."""
        partition, tracker = claim.partition, claim.tracker
        while len(taken) < limit:
            offset = tracker.next
            if offset < partition.first:
                return self._overtaken(claim, taken, stood)
            if offset >= (partition.end if claim.end is None else claim.end):
                return True
            if offset >= tracker.base + LOG_AHEAD:
                self._stands(claim, stood)
                return True
            record, position, _, _ = partition.entries[offset - partition.first]
            deliveries = tracker.deliveries(offset) + 1 + record.deliveries
            alone = deliveries >= LONE_DELIVERY
            if alone and (taken or self.held):
                self.suspect = claim
                self.blocked = not taken
                return False
            attempts = tracker.attempts(offset)
            if attempts:
                record = msgspec.structs.replace(record, attempts=attempts)
            tracker.hand_out(offset)
            lease = Lease(offset, partition.index)
            self.held[lease] = delivery = Delivery(record, lease, position, deliveries)
            taken.append(delivery)
            if alone:
                self.lone.came(lease)
                return False
        return False

    def _stands(self, claim: Claim, stood: Stood) -> None:
        self.blocked = True
        if not claim.standing:
            claim.standing = True
            stood(claim.partition.index, True)

    def _overtaken(self, claim: Claim, taken: list[Delivery], stood: Stood) -> bool | None:
        if taken:
            return None
        name, index, first = claim.partition.name, claim.partition.index, claim.partition.first
        lost = claim.tracker.skip(claim.tracker.base, first)
        if not lost:  # the gap is wider than the window
            self._stands(claim, stood)
            return True
        raise PositionLost(f"{lost} records of {name}[{index}] were removed before they were read", lost=lost)

    def settled(self, stood: Stood, leases: Sequence[Lease]) -> None:
        """Mark *leases*, which were in hand, as done."""
        claims = self.claims
        for lease in leases:
            claim = claims[lease.partition]
            claim.tracker.done(lease.number)
            if claim.standing and claim.tracker.room > 0:
                claim.standing = False
                stood(lease.partition, False)
                claim.arrived()

    def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Let *deliveries*, if they are held, wait again, without counting."""
        for delivery in deliveries:
            if self.held.pop(delivery.token, None) is not None:
                lease = lease_of(delivery)
                claim = self.claims[lease.partition]
                claim.tracker.release(lease.number)
                claim.arrived()

    def hold(self, lease: Lease, attempts: int) -> None:
        """Keep that *attempts* at what is held under *lease* have failed."""
        self.claims[lease.partition].tracker.hold(lease.number, attempts)

    def of(self, claims: Sequence[Claim]) -> list[Delivery]:
        """Return what is held of *claims*."""
        indexes = {claim.partition.index for claim in claims}
        return [delivery for delivery in self.held.values() if lease_of(delivery).partition in indexes]


class Group:
    """A durable group of a topic, or the reader that is its own group."""

    def __init__(self, topic: TopicStore, name: str | None, offsets: Sequence[int], timers: Timers) -> None:
        self.name = name
        self.topic = topic
        self.trackers = [Tracker(offset) for offset in offsets]
        self.members: dict[Member, None] = {}
        self.dropped = ""
        """Why it is no more."""
        self._owners: list[Claim | None] = [None] * len(topic.partitions)
        self._timers = timers

    # ------------------------------------------------------------------ members

    def join(self, member: Member) -> None:
        """Let *member* take part."""
        if self.dropped:
            member.owner.fail(NotFound(self.dropped))
            return
        if self.name is None:
            self.topic.readers[self] = None
        self.members[member] = None
        self._balance()

    def leave(self, member: Member) -> None:
        """Hand back what *member* holds and give its partitions to others."""
        if self.name is None:
            self.topic.readers.pop(self, None)
        if member in self.members:
            del self.members[member]
            member.hand_back(list(member.held.values()))
            for claim in list(member.claims.values()):
                self._end(claim)
            self._balance()

    def suspend(self, member: Member) -> None:
        """*member* shows no sign of life: it is out after its session time."""
        if member.deadline is None and member in self.members and self.name is not None:
            member.deadline = deadline = self._timers.now() + member.survives
            self._timers.at(deadline, functools.partial(self._expire, member, deadline))

    def resume(self, member: Member) -> bool:
        """*member* lives; return whether it still takes part."""
        member.deadline = None
        return member in self.members

    def _expire(self, member: Member, deadline: float) -> None:
        if member.deadline == deadline and member in self.members:
            del self.members[member]
            lost = list(member.held.values())
            member.held.clear()
            for claim in list(member.claims.values()):
                self._end(claim)
            member.owner.lost(lost)
            self._balance()

    def _end(self, claim: Claim) -> None:
        """Take *claim* from its member; what is still in hand counts a delivery."""
        member, index = claim.member, claim.partition.index
        for delivery in member.of([claim]):
            del member.held[delivery.token]
        claim.tracker.crashed()
        del member.claims[index]
        if claim.queued:
            member.pending.remove(claim)
        if member.suspect is claim:
            member.suspect = None
        claim.partition.claims.remove(claim)
        self._owners[index] = None
        if member.blocked:  # there is more room now
            member.owner.wake()

    # ------------------------------------------------------------------ balance

    def _balance(self) -> None:
        """Move as few partitions as make the members equal; one that is in use moves when its owner has let go."""
        moving: dict[Member, list[Claim]] = {}
        for partition, member in zip(self.topic.partitions, self._target(), strict=True):
            claim = self._owners[partition.index]
            if claim is not None and claim.member is not member and not claim.revoking:
                if claim.member.of([claim]):
                    claim.revoking = True
                    moving.setdefault(claim.member, []).append(claim)
                else:
                    self._end(claim)
                    claim = None
            if claim is None and member is not None:
                self._give(partition, member)
        for member, claims in moving.items():
            member.owner.revoke(member.of(claims), functools.partial(self._moved, member, claims))

    def _give(self, partition: Partition, member: Member) -> None:
        end = None if member.ends is None else member.ends[partition.index]
        claim = Claim(member, partition, self.trackers[partition.index], end)
        self._owners[partition.index] = member.claims[partition.index] = claim
        partition.claims.append(claim)
        claim.arrived()

    def _moved(self, member: Member, claims: Sequence[Claim], let_go: bool) -> None:
        for claim in claims:
            if member.claims.get(claim.partition.index) is claim:
                if let_go:  # what has not run there is no suspect of anything
                    member.hand_back(member.of([claim]))
                self._end(claim)
        self._balance()

    def _target(self) -> list[Member | None]:
        """Return who should own each partition: equal shares, with as much as possible left where it is."""
        members = list(self.members)
        if not members:
            return [None] * len(self._owners)
        share, more = divmod(len(self._owners), len(members))
        owned = dict.fromkeys(members, 0)
        target: list[Member | None] = [None] * len(self._owners)
        full = 0
        for index, claim in enumerate(self._owners):
            if claim is None or claim.member not in owned:
                continue
            have = owned[claim.member]
            if have < share or (have == share and full < more):
                full += have == share
                owned[claim.member] += 1
                target[index] = claim.member
        for index, member in enumerate(target):
            if member is None:
                taker = min(members, key=owned.__getitem__)
                owned[taker] += 1
                target[index] = taker
        return target

    # ------------------------------------------------------------------ looking

    def ended(self, ends: Sequence[int]) -> bool:
        """Return whether everything before *ends* was handed out."""
        return all(tracker.next >= end for tracker, end in zip(self.trackers, ends, strict=True))

    def backlog(self, dead: int) -> Backlog:
        """Return what this group has left to do."""
        waiting = in_flight = 0
        oldest: float | None = None
        for partition, tracker in zip(self.topic.partitions, self.trackers, strict=True):
            waiting += max(0, partition.end - max(tracker.high, partition.first)) + tracker.waiting
            in_flight += tracker.in_hand
            base = max(tracker.base, partition.first)
            if base < partition.end:
                timestamp = partition.entries[base - partition.first][0].timestamp
                oldest = timestamp if oldest is None else min(oldest, timestamp)
        age = None if oldest is None else max(0.0, self._timers.epoch() - oldest)
        return Backlog(waiting=waiting, in_flight=in_flight, delayed=0, dead=dead, oldest_age=age)

    def seek(self, offsets: Sequence[int]) -> None:
        """Begin anew at *offsets*."""
        self.trackers[:] = [Tracker(offset) for offset in offsets]

    def drop(self, why: str) -> None:
        """The group, or its topic, is deleted."""
        self.dropped = why
        for member in list(self.members):
            member.held.clear()
            for claim in list(member.claims.values()):
                self._end(claim)
            member.owner.fail(NotFound(why))
        self.members.clear()
