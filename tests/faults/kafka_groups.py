"""The groups of plays on Kafka: who looks after them, and of which kind they are.

What is asked here is asked by hand: librdkafka's administrator crashes where a coordinator is not ready.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Final

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient

from ..servers.kafka import KafkaCluster, Wire
from ..servers.kafka.wire import Reader, array, text
from .stage import PATIENCE, Stage
from .worker import GROUP, TOPIC

OFFSET_COMMIT: Final = 8
OFFSET_FETCH: Final = 9
READY: Final = 20.0


def name_of(stage: Stage, address: str) -> str:
    """Return what Kafka calls the topic of an address."""
    return stage.url.partition("prefix=")[2].partition("&")[0] + address


def group_of(stage: Stage, address: str) -> str:
    """Return what Kafka calls the group that reads an address."""
    return name_of(stage, address) + (f"..{GROUP}" if address == TOPIC.name else "")


def coordinator(stage: Stage, cluster: KafkaCluster) -> int:
    """Return which broker coordinates one of the groups."""
    with cluster.endpoints.wire() as admin:
        return admin.coordinator(group_of(stage, stage.random.choice(stage.of)))


def share_coordinator(stage: Stage, cluster: KafkaCluster) -> int:
    """Return which broker keeps what is done of a partition of the queue."""
    name = name_of(stage, "queue")
    admin = AdminClient({"bootstrap.servers": cluster.endpoints.bootstrap()})
    topic = admin.describe_topics(TopicCollection([name]))[name].result(READY)
    number = 0
    for character in f"{name}:{topic.topic_id}:{stage.random.randrange(len(topic.partitions))}":  # as Java counts
        number = (31 * number + ord(character)) & 0xFFFFFFFF
    number = number - (1 << 32) if number >= 1 << 31 else number
    with cluster.endpoints.wire() as wire:
        leaders = wire.cluster(["__share_group_state"]).topics["__share_group_state"]
    return leaders[abs(number) % len(leaders)]


def meet(cluster: KafkaCluster, group: str) -> None:
    """Return when the coordinator of *group* knows it: what the first groups of a cluster wait for is in no play."""
    with cluster.endpoints.wire() as admin:
        admin.keeper()

    def read(answer: Reader) -> int:
        for _ in answer.items():
            raise AssertionError("a new group has stored something")
        return answer.number("h")

    _ask(cluster, group, OFFSET_FETCH, text(group) + array(()), read)


def be_classic(cluster: KafkaCluster, group: str, topic: str) -> None:
    """Have *group* be a classic one, as it is where a cluster without share groups has had it."""

    def read(answer: Reader) -> int:
        codes = []
        for _ in answer.items():
            answer.text()
            for _ in answer.items():
                answer.number("i")
                codes.append(answer.number("h"))
        return codes[0]

    place = struct.pack(">iq", 0, 0) + text("")
    told = (
        text(group) + struct.pack(">i", -1) + text("") + struct.pack(">q", -1) + array([text(topic) + array([place])])
    )
    _ask(cluster, group, OFFSET_COMMIT, told, read)


def _ask(cluster: KafkaCluster, group: str, key: int, body: bytes, read: Callable[[Reader], int]) -> None:
    """Ask the coordinator of *group* until it does what it is asked."""
    end = time.monotonic() + READY * PATIENCE
    while True:
        with cluster.endpoints.wire() as admin:
            node = admin.coordinator(group)
        with Wire(cluster.endpoints.ports[node]["PLAIN"]) as broker:
            code = read(broker.ask(key, 2, body))
        if not code:
            return
        assert time.monotonic() < end, f"the coordinator of {group} answers with error {code}"
        time.sleep(0.1)
