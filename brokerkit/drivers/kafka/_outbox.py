"""What is published to one topic, partition by partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...address import Address, Queue, Topic
from ...driver import Record
from ...errors import BrokerError, NotAttempted
from ._batch import Entry, Lane, Result
from ._cluster import TopicInfo
from ._records import hash_of

_RUN: Final = 500
"""Records without a key that follow each other into one partition."""


class Outbox:
    """What is published to one topic."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.name = address.name
        self.queue = isinstance(address, Queue)
        self.lanes: list[Lane] = []
        self.info: TopicInfo | None = None
        self.opening = False
        """Whether somebody finds out what has become of the topic."""
        self._sticky = 0
        self._run = 0

    def adopt(self, info: TopicInfo) -> list[Entry]:
        """Take note of what the topic is by now; return what can go nowhere, as another topic has its name."""
        before, self.info = self.info, info
        stranded: list[Entry] = []
        if before is not None and before.id != info.id:
            stranded = [entry for lane in self.lanes for entry in lane.take_all()]
            self.lanes = []
        self.lanes += [Lane(number) for number in range(len(self.lanes), len(info.partitions))]
        return stranded

    def lane(self, key: bytes | None) -> Lane:
        """Return where a record of *key* goes; without one, where others of this moment go."""
        lanes = self.lanes
        if key is not None:
            return lanes[hash_of(key) % len(lanes)]
        self._run += 1
        if self._run > _RUN:
            self.move_on()
        return lanes[self._sticky % len(lanes)]

    def move_on(self) -> None:
        """Let the next records without a key go to another partition, one that has a leader."""
        self._run = 0
        assert self.info is not None
        for _ in self.lanes:
            self._sticky = (self._sticky + 1) % len(self.lanes)
            if self.info.leader(self._sticky) >= 0:
                return


def failures(records: Sequence[Record], error: BrokerError) -> list[Result]:
    """Return *error* for each record, but `NotAttempted` for those that would overtake a failed one of their key."""
    results: list[Result] = []
    failed: set[bytes] = set()
    for record in records:
        if record.key is not None and isinstance(record.address, Topic):
            if record.key in failed:
                results.append(overtakes(record))
                continue
            failed.add(record.key)
        results.append(error)
    return results


def overtakes(record: Record) -> NotAttempted:
    """Return why *record* is not sent."""
    return NotAttempted(f"an earlier message of the key {record.key!r} was not stored")
