"""Topics that other clients of Kafka write and read: here librdkafka, which chooses partitions as Java's client does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from brokerkit import Start, Topic, connect
from brokerkit.address import AnyTopic
from brokerkit.broker import Broker
from brokerkit.drivers.kafka._records import hash_of
from tests.servers.kafka import shared_kafka

pytestmark = pytest.mark.asyncio

KEYS = [b"", b"\x00", b"a", b"\xff\xfe", *(f"customer-{number}".encode() for number in range(60)), b"k" * 1024]


def unique(name: str = "orders") -> str:
    return f"i{uuid.uuid4().hex[:12]}.{name}"


def url() -> str:
    return shared_kafka().url()


class Others:
    """Another program, that knows nothing of brokerkit."""

    def __init__(self) -> None:
        self.servers = shared_kafka().bootstrap()
        # "murmur2_random" is what Java's client does, in librdkafka's words.
        self.producer = Producer({"bootstrap.servers": self.servers, "partitioner": "murmur2_random"})

    def write(self, topic: str, value: bytes | None, **options: Any) -> Message:
        """Store a record; return it with its place."""
        found: list[Message] = []

        def stored(error: object, message: Message) -> None:
            assert error is None, error
            found.append(message)

        self.producer.produce(topic, value=value, on_delivery=stored, **options)
        assert self.producer.flush(20) == 0
        (message,) = found
        return message

    def read(self, topic: str, count: int) -> list[Message]:
        """Read so many records from the beginning on."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.servers,
                "group.id": f"{topic}-{uuid.uuid4().hex}",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        consumer.subscribe([topic])
        found: list[Message] = []
        end = time.monotonic() + 30
        while len(found) < count:
            assert time.monotonic() < end, f"only {len(found)} of {count} came"
            message = consumer.poll(0.2)
            if message is not None:
                assert message.error() is None, message.error()
                found.append(message)
        consumer.close()
        return found


def must(value: Any) -> Any:
    """Return what librdkafka says that may be None."""
    assert value is not None
    return value


async def everything(broker: Broker, topic: AnyTopic) -> list[Any]:
    async with broker.subscribe(topic, start=Start.EARLIEST, until_end=True) as messages:
        return [message async for message in messages]


# The numbers are those of Kafka's own test of this hash, in UtilsTest.java.
@pytest.mark.parametrize(
    "key, number",
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        ("abc", 479470107),
    ],
)
async def test_keys_are_hashed_as_java_does(key: str, number: int) -> None:
    assert hash_of(key.encode()) == number & 0x7FFFFFFF


@pytest.mark.parametrize("partitions", [1, 5, 12])
async def test_a_key_goes_where_others_put_it(partitions: int) -> None:
    topic = Topic(unique(), bytes, partitions=partitions)
    others = Others()
    async with connect(url()) as broker:
        await broker.publish_many(topic, [topic.outgoing(b"ours", key=key) for key in KEYS])
        theirs = {key: must(others.write(topic.name, b"theirs", key=key).partition()) for key in KEYS}
        read = others.read(topic.name, 2 * len(KEYS))
        ours = {must(message.key()): message.partition() for message in read if message.value() == b"ours"}
        assert ours == theirs
        assert partitions == 1 or len(set(theirs.values())) == partitions
        # and so what both have written stays in order
        both = [message for message in await everything(broker, topic) if message.key == "customer-1"]
        assert [message.value for message in both] == [b"ours", b"theirs"]
        await broker.delete(topic)


async def test_others_read_what_we_write() -> None:
    topic: Topic[dict[str, Any]] = Topic(unique(), dict[str, Any], partitions=1)
    before = time.time()
    async with connect(url()) as broker:
        headers = {"tenant": "ö", "trace": "1"}
        receipt = await broker.publish(topic, {"total": 9.5}, key="c1", id="order-1", headers=headers)
        await broker.publish(topic, {"total": 1})
        first, second = Others().read(topic.name, 2)
        assert (first.key(), first.value()) == (b"c1", b'{"total":9.5}')
        known = dict(must(first.headers()))
        assert known == {
            "bk-id": b"order-1",
            "bk-content-type": b"application/json",
            "tenant": "ö".encode(),
            "trace": b"1",
        }
        kind, milliseconds = first.timestamp()
        assert kind == 1  # set by the writer
        assert before - 0.001 <= milliseconds / 1000 <= time.time()
        assert receipt.position == f"{topic.name}[0]@{milliseconds}-0"
        assert second.key() is None
        assert dict(must(second.headers()))["bk-id"]
        await broker.delete(topic)


async def test_we_read_what_others_write() -> None:
    topic = Topic(unique(), dict[str, int] | None, owned=False)
    others = Others()
    with shared_kafka().wire() as wire:
        wire.create(topic.name, 2, {"retention.ms": "-1"})  # else the broker removes what is so old
    others.write(topic.name, b'{"a": 1}', key=b"\xff\x00", timestamp=1_700_000_000_123, partition=0)
    others.write(topic.name, None, key=b"k", headers=[("x", b"1"), ("x", b"2"), ("y", None)], partition=1)
    async with connect(url()) as broker:
        first, second = sorted(await everything(broker, topic), key=lambda message: message.position)
        assert (first.value, first.key, first.id) == ({"a": 1}, "\udcff\x00", f"{topic.name}[0]@1700000000123-0")
        assert first.timestamp == datetime.fromtimestamp(1_700_000_000.123, UTC)
        assert (second.value, second.key) == (None, "k")
        assert dict(second.headers) == {"x": "2", "y": ""}
    with shared_kafka().wire() as wire:
        assert topic.name in wire.cluster(None).topics
        wire.delete([topic.name])


async def test_a_group_works_on_what_others_write_and_goes_on_where_it_was() -> None:
    topic = Topic(unique(), str, partitions=2)
    others = Others()
    async with connect(url()) as broker:
        await broker.declare(topic)
        for number in range(20):
            others.write(topic.name, b"m%02d" % number, key=b"%d" % number)
        seen: list[str] = []
        for _ in range(2):
            async with broker.subscribe(topic, group="workers", until_end=True) as messages:
                async for message in messages:
                    seen.append(message.value)
                    await message.ack()
        assert sorted(seen) == [f"m{number:02}" for number in range(20)]
        # others see how far it is
        consumer = Consumer({"bootstrap.servers": others.servers, "group.id": f"{topic.name}..workers"})
        places = consumer.committed([TopicPartition(topic.name, number) for number in (0, 1)], 10)
        assert sum(place.offset for place in places) == 20
        consumer.close()
        await broker.delete(topic)


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
@pytest.mark.parametrize("way", ["ours", "theirs"])
async def test_compressed_records_are_read_by_all(codec: str, way: str) -> None:
    topic = Topic(unique(), bytes, partitions=1)
    body = b"the same again and again " * 400
    async with connect(url(), options={"compression": codec}) as broker:
        await broker.declare(topic)
        if way == "ours":
            await broker.publish_many(topic, [body] * 20)
            assert [message.value() for message in Others().read(topic.name, 20)] == [body] * 20
        else:
            producer = Producer({"bootstrap.servers": shared_kafka().bootstrap(), "compression.type": codec})
            for _ in range(20):
                producer.produce(topic.name, value=body)
            assert producer.flush(20) == 0
        assert [message.value for message in await everything(broker, topic)] == [body] * 20
        await broker.delete(topic)


async def test_only_what_is_committed_of_others_transactions_is_read() -> None:
    topic = Topic(unique(), bytes, partitions=1)
    async with connect(url()) as broker:
        await broker.declare(topic)
        producer = Producer({"bootstrap.servers": shared_kafka().bootstrap(), "transactional.id": topic.name})
        producer.init_transactions(20)
        end: Callable[[float], None]
        for text, end in ((b"a", producer.commit_transaction), (b"b", producer.abort_transaction)):
            producer.begin_transaction()
            producer.produce(topic.name, value=text)
            end(20)
        await broker.publish(topic, b"c")
        end_of_waiting = time.monotonic() + 20
        while not (found := await everything(broker, topic)):  # the broker ends a transaction behind its answer
            assert time.monotonic() < end_of_waiting
        assert [message.value for message in found] == [b"a", b"c"]
        async with broker.subscribe(topic, group="workers", until_end=True) as messages:
            values = []
            async for message in messages:
                values.append(message.value)
                await message.ack()
        assert values == [b"a", b"c"]
        assert (await broker.backlog(topic, "workers")).waiting == 0
        await broker.delete(topic)
