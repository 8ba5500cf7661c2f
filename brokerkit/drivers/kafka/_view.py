"""What a cluster tells of its topics."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec


class Partition(msgspec.Struct, frozen=True):
    """A part of a topic."""

    index: int
    leader: int
    """The node that leads it; -1 while none does."""
    epoch: int


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic as the cluster describes it."""

    name: str
    id: uuid.UUID
    """Another one if the topic was deleted and made again."""
    partitions: tuple[Partition, ...]
    """In order, without gaps."""

    def leader(self, partition: int) -> int:
        """Return the node that leads *partition*, -1 if none does."""
        return self.partitions[partition].leader if partition < len(self.partitions) else -1


def told_of(name: str, topic: Any) -> TopicInfo:
    """Return what an answer about *name* says."""
    places = sorted(topic.partitions, key=lambda place: int(place.partition_index))
    partitions = [Partition(int(each.partition_index), int(each.leader_id), int(each.leader_epoch)) for each in places]
    return TopicInfo(name, topic.topic_id or uuid.UUID(int=0), tuple(partitions))


def latest(known: TopicInfo, told: TopicInfo) -> TopicInfo:
    """Return what is newest of two answers about one topic: a broker may know less than another that was asked before."""
    partitions = [
        before if before.epoch > after.epoch else after
        for before, after in zip(known.partitions, told.partitions, strict=False)
    ]
    rest = max(known.partitions, told.partitions, key=len)[len(partitions) :]
    return TopicInfo(told.name, told.id, (*partitions, *rest))
