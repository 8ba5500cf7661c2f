"""A topic of Kafka that others write and read too, with a Kafka client of their own.  Here they have aiokafka.

    python examples/kafka_client.py [kafka://HOST:PORT]

Prints:

    they have written: {"cart": "c1", "total": "9.90"}
    we have read: Cart(cart='c1', total=Decimal('9.90')) with key c1, called example-carts[...]@...
    they have emptied c1: None
    we have written: Paid(cart='c1', method='card')
    they have read: {"cart":"c1","method":"card"} with key b'c1' and headers bk-id=..., bk-content-type=application/json
"""

# What others run comes without types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from decimal import Decimal
from urllib.parse import urlsplit

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from brokerkit import Broker, Start, Topic, connect


@dataclass
class Cart:
    cart: str
    total: Decimal


@dataclass
class Paid:
    cart: str
    method: str


# owned=False: theirs, so it is never created, altered or deleted here, and a prefix does not change its name.
CARTS = Topic("example-carts", Cart | None, owned=False)
PAID = Topic("example-paid", Paid, partitions=2)


async def they_write(servers: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(CARTS.name, 2, 1)])
    finally:
        await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=servers, acks="all") as producer:
        text = '{"cart": "c1", "total": "9.90"}'
        print("they have written:", text)
        await producer.send_and_wait(CARTS.name, text.encode(), key=b"c1")
        await producer.send_and_wait(CARTS.name, None, key=b"c1")  # a tombstone


async def we_read(broker: Broker) -> None:
    async with broker.subscribe(CARTS, start=Start.EARLIEST, until_end=True) as messages:
        async for message in messages:
            if message.value is None:
                print(f"they have emptied {message.key}: {message.value}")
            else:  # it was given no id, so its place is its name
                print(f"we have read: {message.value} with key {message.key}, called {shown(message.id)}")


async def we_write(broker: Broker) -> None:
    paid = Paid("c1", "card")
    await broker.publish(PAID, paid, key=paid.cart)
    print("we have written:", paid)


async def they_read(servers: str) -> None:
    async with AIOKafkaConsumer(PAID.name, bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        record = await consumer.getone()
        headers = ", ".join(f"{name}={value.decode()}" for name, value in record.headers)
        text = f"{(record.value or b'').decode()} with key {record.key} and headers {shown(headers)}"
        print("they have read:", text)


async def they_clean_up(servers: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics([CARTS.name])
    await admin.close()


def shown(text: str) -> str:
    """Return *text* without what differs from run to run."""
    return re.sub(r"bk-id=\w[\w-]*", "bk-id=...", re.sub(r"\[\d+\]@\d+-\d+", "[...]@...", text))


async def main(url: str) -> None:
    servers = urlsplit(url).netloc
    await they_write(servers)
    try:
        async with connect(url) as broker:
            await we_read(broker)
            await we_write(broker)
            await they_read(servers)
            await broker.delete(PAID)  # only so that this example can run again
    finally:
        await they_clean_up(servers)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "kafka://localhost:9092")))
