"""What is published to one topic, partition by partition."""

from __future__ import annotations

from typing import Final

from ...address import Address, DeadLetters, Queue
from ...driver import Record
from ._batch import AnyEntry, Kind, Lane, Producer
from ._records import hash_of
from ._tiers import is_waiting, tier_of
from ._view import TopicInfo

_RUN: Final = 500
"""Records without a key that follow each other into one partition."""


class Outbox:
    """What is published to one topic."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.name = address.name
        self.derived = ".." in address.name
        """Whether what is first stored there creates it."""
        self.tiers = isinstance(address, Queue) and is_waiting(address)
        """Whether it is where messages wait for their time: that decides on the partition."""
        self.lanes: list[Lane] = []
        self.info: TopicInfo | None = None
        """None while there is no such topic."""
        self._kind: Kind = (
            "queue" if isinstance(address, Queue) else "letters" if isinstance(address, DeadLetters) else "topic"
        )
        self._id: object = None
        self._sticky = 0
        self._run = 0
        self._cuts = 0

    def adopt(self, info: TopicInfo, producer: Producer | None) -> list[AnyEntry]:
        """Take note of what the topic is by now; return what was on its way to another topic of that name.

        *producer* must not be used for a topic that is new: a broker may not have heard yet that it is another one.
        """
        stranded: list[AnyEntry] = []
        lost: Producer | None = None
        if self._id != info.id:
            stranded = self.take_all()
            if self._id is not None:
                lost = producer
            self._id, self.lanes, self._sticky = info.id, [], 0
        self.info = info
        for number in range(len(self.lanes), len(info.partitions)):
            self.lanes.append(Lane(self.name, number, self._kind, lost))
        for lane in self.lanes:
            lane.leader = info.leader(lane.number)
        return stranded

    def lose(self) -> None:
        """Note that there is no such topic.  It may come back as it was: numbers are kept."""
        self.info = None
        for lane in self.lanes:
            lane.leader = -1

    def take_all(self) -> list[AnyEntry]:
        """Take out all that is on its way."""
        return [entry for lane in self.lanes for entry in lane.take_all()]

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return any(lane.waiting for lane in self.lanes)

    def run(self, count: int) -> int:
        """Return how many of *count* records of one call, which have no keys, go to the same partition: they are spread."""
        return _RUN if count == 1 else min(_RUN, -(-count // len(self.lanes)))

    def lane(self, record: Record, run: int = _RUN) -> Lane:
        """Return where *record* goes; without a key, where others of this moment go, *run* of them at most."""
        lanes, key = self.lanes, record.key
        if self.tiers:
            return lanes[min(tier_of(record.delay), len(lanes) - 1)]
        if key is not None:
            return lanes[hash_of(key) % len(lanes)]
        lane = lanes[self._sticky]
        if self._run >= run or lane.cuts != self._cuts:  # what it had is on its way
            lane = self._move_on()
        self._run += 1
        return lane

    def _move_on(self) -> Lane:
        """Let the next records without a key go to another partition, one that has a leader."""
        for _ in self.lanes:
            self._sticky = (self._sticky + 1) % len(self.lanes)
            if self.lanes[self._sticky].leader >= 0:
                break
        lane = self.lanes[self._sticky]
        self._run, self._cuts = 0, lane.cuts
        return lane
