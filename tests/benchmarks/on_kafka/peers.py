"""Other libraries on Kafka, each set up as its documentation recommends for what it promises."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from ..on_servers.client import Got, Publisher
from ..on_servers.libraries import FastStreamClient, TaskiqClient
from .log import Log
from .raw import AT_ONCE, BIG
from .server import bootstrap


class FastStream(FastStreamClient, Log):
    """FastStream, which commits each message once it is handled."""

    name = "faststream"
    note = (
        "acks=1, NACK_ON_ERROR: a commit after each handler; that allows as many handlers at once as there are partitions; "
        "many: publish_batch, with max_batch_size raised"
    )
    least = 200
    first: ClassVar[bool] = False
    """Whether it acknowledges before the handler."""

    def broker(self, **options: Any) -> Any:
        from faststream.kafka import KafkaBroker

        silent: Any = None
        return KafkaBroker(bootstrap(self.job.url), logger=silent, **options)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        name, keyed = self.job.entity, self.work.keyed
        broker = self.broker(**({} if self.work.stores and self.work.batch == 1 else {"max_batch_size": BIG}))
        await broker.start()
        try:

            def one(item: Any) -> Any:
                return broker.publish(item, topic=name, key=item["user"].encode() if keyed else None)

            yield Publisher(one, lambda items: broker.publish_batch(*items, topic=name))
        finally:
            await broker.stop()

    def subscribe(self, broker: Any) -> Any:
        from faststream import AckPolicy

        handlers, policy = min(self.work.handlers, self.work.partitions), AckPolicy.NACK_ON_ERROR
        if self.first:
            handlers, policy = self.work.handlers, AckPolicy.ACK_FIRST
        return broker.subscriber(
            self.job.entity,
            group_id=self.group,
            auto_offset_reset="earliest",
            max_workers=handlers,
            ack_policy=policy,
        )


class FastStreamFirst(FastStream):
    """FastStream as it is by default."""

    name = "faststream-first"
    note = "ACK_FIRST, its default: committed each 5 s whether handled or not: not at least once"
    first = True
    peer = False


class FastStreamBatch(FastStream):
    """FastStream with handlers of whole batches."""

    name = "faststream-batch"
    note = "batch=True, max_records=100: a handler of a list, and a commit after it"

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from faststream import AckPolicy

        broker = self.broker()

        async def handle(values: list[dict[str, Any]]) -> None:
            for value in values:
                got(value)

        broker.subscriber(
            self.job.entity,
            group_id=self.group,
            auto_offset_reset="earliest",
            batch=True,
            max_records=AT_ONCE,
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )(handle)
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()


class Taskiq(TaskiqClient, Log):
    """taskiq, whose broker of Kafka cannot acknowledge."""

    name = "taskiq"
    note = (
        "taskiq-aio-kafka, acks=1; many: gather of kiq(); consuming: Receiver(max_async_tasks=handlers), committed each 5 s "
        "whether handled or not: not at least once; with aiokafka's partitioner and assignor, as those of a new kafka-python do "
        "not fit"
    )
    least = 200

    def broker(self) -> Any:
        from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
        from aiokafka.partitioner import DefaultPartitioner
        from taskiq_aio_kafka import AioKafkaBroker

        broker = AioKafkaBroker(bootstrap(self.job.url), kafka_topic=self.job.entity)
        broker.configure_producer(partitioner=DefaultPartitioner())
        broker.configure_consumer(
            group_id=self.group,
            auto_offset_reset="earliest",
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        )
        return broker


class TaskiqConsuming(Taskiq):
    """The same, where it is no peer: it acknowledges what it was not told to."""

    peer = False
