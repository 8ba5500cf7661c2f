"""A program that uses the whole API as it is meant to be used: no checker may find anything in it."""
# pyright: strict

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar, assert_type

from addresses import (
    COMPACTED,
    EMAILS,
    ENVELOPES,
    EVENTS,
    FASTS,
    FOREIGN,
    LISTS,
    MAPS,
    MAYBES,
    MODELS,
    ORDERS,
    POINTS,
    QUOTES,
    ROWS,
    Base,
    Created,
    Database,
    Derived,
    Email,
    Envelope,
    Fast,
    Model,
    Order,
    Point,
    Row,
    Shipped,
)

import brokerkit
from brokerkit import (
    EVERY_REPLICA,
    Backlog,
    Batch,
    BrokerError,
    DeadLetters,
    Health,
    Letter,
    Message,
    Nack,
    Outgoing,
    Queue,
    Receipt,
    RedriveReport,
    Reject,
    Reply,
    RetryPolicy,
    Service,
    Start,
    Stored,
    Topic,
    connect,
)
from brokerkit.blocking import connect as connect_blocking

G = TypeVar("G")

# ------------------------------------------------------------------ addresses know their payload

assert_type(ORDERS, Topic[Order])
assert_type(EVENTS, Topic[Created | Shipped])
assert_type(FOREIGN, Topic[bytes])
assert_type(COMPACTED, Topic[bytes | None])
assert_type(EMAILS, Queue[Email])
assert_type(ROWS, Queue[Row])
assert_type(ENVELOPES, Queue[Envelope[int]])
assert_type(MAPS, Queue[dict[str, Any]])
assert_type(QUOTES, Queue[Order, Reply[float]])
assert_type(MAYBES, Queue[Order, Reply[float | None]])
assert_type(EMAILS.dead_letters, DeadLetters[Email])
assert_type(ORDERS.dead_letters("billing"), DeadLetters[Order])
assert_type(ORDERS.outgoing(Order("a", 1), key="k"), Outgoing[Order])

declared: Queue[Email] = Queue("emails", Email, priorities=3, dedup=60, lease=30)
declared_reply: Queue[Order, Reply[float]] = Queue("quotes", Order, reply=float)
declared_wide: Queue[Order, Reply[float | None]] = Queue("quotes", Order, reply=float | None)
of_the_base: Topic[Base] = Topic("base", Derived)  # the declared type is what counts


class Upper:
    """A codec of one's own."""

    content_type = "text/x-upper"

    def encode(self, value: str, /) -> bytes:
        return value.upper().encode()

    def decode(self, body: bytes, headers: Mapping[str, str], /) -> str:
        return body.decode().lower()


UPPER = Topic("upper", str, codec=Upper())
assert_type(UPPER, Topic[str])

# ------------------------------------------------------------------ services and handlers


@asynccontextmanager
async def resources() -> AsyncGenerator[Database]:
    yield Database()


service = Service("billing", lifespan=resources)
bare = Service("bare")
assert_type(service, Service[Database])
assert_type(bare, Service[None])


async def smtp(email: Email) -> None: ...


@service.subscribe(ORDERS, concurrency=8)
async def bill(message: Message[Order], db: Database) -> None:
    await message.publish(EMAILS, Email("ann@x.org", "thanks"), delay=3, ttl=60, priority=0)
    await message.publish(ORDERS, message.value, key="k", headers={"a": "b"})


@service.subscribe(EMAILS, retry=RetryPolicy(attempts=3, wait_initial=0.5), max_deliveries=3, timeout=None)
async def send(message: Message[Email]) -> None:
    if "@" not in message.value.to:
        raise Reject("not an address")
    await smtp(message.value)
    raise Nack(delay=30)


@service.subscribe(QUOTES)
async def quote(message: Message[Order]) -> float:
    return message.value.total * 1.2


@service.subscribe(QUOTES)
def quote_in_a_thread(message: Message[Order], db: Database) -> float:
    return 1.0


@service.subscribe(QUOTES)
async def quote_with_an_int(message: Message[Order]) -> int:
    return 1


@service.subscribe(MAYBES)
async def maybe(message: Message[Order]) -> float | None:
    return None


@service.subscribe(MAYBES)
async def surely(message: Message[Order]) -> float:
    return 1.0


@service.subscribe(EMAILS)
def in_a_thread(message: Message[Email]) -> None: ...


@service.subscribe(ORDERS, group=EVERY_REPLICA)
async def everywhere(message: Message[Order]) -> None: ...


@service.subscribe(ORDERS, group="audit", start=Start.at(datetime.now(UTC)), batch=Batch(100))
async def many(messages: Sequence[Message[Order]], db: Database) -> None:
    for message in messages:
        await message.ack(confirm=True)


@service.subscribe(EMAILS, batch=Batch(max=100, wait=1))
async def many_emails(messages: Sequence[Message[Email]]) -> None: ...


@service.subscribe(EVENTS)
async def either(message: Message[Created | Shipped]) -> None:
    match message.value:
        case Created():
            assert_type(message.value, Created)
        case Shipped():
            assert_type(message.value, Shipped)


@service.subscribe(EVENTS)
async def anything(message: Message[object]) -> None: ...  # a message is only read: covariant


@service.subscribe(ROWS)
async def row(message: Message[Row]) -> None:
    print(message.value["a"])


@service.subscribe(ORDERS)
@service.subscribe(Topic("others", Order))
async def twice(message: Message[Order]) -> None: ...


class Handlers:
    async def method(self, message: Message[Order], db: Database) -> None: ...

    async def __call__(self, message: Message[Order]) -> None: ...

    @staticmethod
    async def static(message: Message[Order]) -> None: ...


async def with_more(extra: int, message: Message[Order]) -> None: ...


async def with_default(message: Message[Order], db: Database | None = None) -> None: ...


async def with_anything(*args: Any, **options: Any) -> None: ...


service.subscribe(ORDERS)(Handlers().method)
service.subscribe(ORDERS)(Handlers())
service.subscribe(ORDERS)(Handlers.static)
service.subscribe(ORDERS)(partial(with_more, 1))
service.subscribe(ORDERS)(lambda message: None)
service.subscribe(ORDERS)(lambda message, db: None)
service.subscribe(QUOTES)(lambda message: message.value.total)
service.subscribe(ORDERS)(with_default)
service.subscribe(ORDERS)(with_anything)
bare.include(service)


def attach(some: Service[Database], topic: Topic[G]) -> None:
    @some.subscribe(topic)
    async def handler(message: Message[G]) -> None: ...  # pyright: ignore[reportUnusedFunction]


# ------------------------------------------------------------------ a broker


async def publishing() -> None:
    async with connect("redis://localhost:6379/0", declare="check") as broker, service.running(broker, drain=5):
        assert_type(await broker.publish(ORDERS, Order("o1", 10.0), key="customer-7"), Receipt)
        await broker.publish(EMAILS, Email("ann@x.org", "hi"), delay=60)
        await broker.publish(EMAILS, Email("ann@x.org", "hi"), delay=datetime.now(UTC), ttl=60, priority=0)
        await broker.publish(QUOTES, Order("o1", 10.0), priority=0)
        await broker.publish(EVENTS, Created("x"), headers={"traceparent": "00"}, timeout=3)
        await broker.publish(ROWS, Row(a=1))
        await broker.publish(POINTS, Point(1))
        await broker.publish(FASTS, Fast(1))
        await broker.publish(MODELS, Model(a=1))
        await broker.publish(ENVELOPES, Envelope(1))
        await broker.publish(MAPS, {"a": 1})
        await broker.publish(LISTS, [Order("a", 1)])
        await broker.publish(COMPACTED, None, key=b"k")
        await broker.publish(UPPER, "text", id="an-id")


async def publishing_many() -> None:
    async with connect("memory://", options={"prefix": "a."}) as broker:
        events: list[Created | Shipped] = [Created("x"), Shipped("y")]
        orders: list[Order] = []
        assert_type(await broker.publish_many(ORDERS, orders), list[Receipt | BrokerError])
        await broker.publish_many(ORDERS, [ORDERS.outgoing(Order("a", 1)), ORDERS.outgoing(Order("b", 2), key="k")])
        await broker.publish_many(EVENTS, events)
        await broker.publish_many(EVENTS, [EVENTS.outgoing(Created("x")), EVENTS.outgoing(Shipped("x"), key="a")])
        await broker.publish_many(EVENTS, (EVENTS.outgoing(Created(str(i)), key="k") for i in range(3)))
        await broker.publish_many(ROWS, [ROWS.outgoing({"a": 1}, delay=3, ttl=60, priority=0)])
        await broker.publish_many(ROWS, [Row(a=1)])


async def requesting() -> None:
    async with connect("memory://") as broker:
        assert_type(await broker.request(QUOTES, Order("o2", 3.0), timeout=2), float)
        assert_type(await broker.request(MAYBES, Order("o2", 3.0), timeout=2, headers={"a": "b"}), float | None)
        print(await broker.request(QUOTES, Order("o2", 3.0), timeout=2))
        wider: Queue[Order, Reply[object]] = QUOTES
        print(wider)


async def reading() -> None:
    async with connect("memory://") as broker:
        async with broker.subscribe(ORDERS, start=Start.EARLIEST, until_end=True) as messages:
            async for message in messages:
                assert_type(message, Message[Order])
                assert_type(message.value, Order)
        async with broker.subscribe(ORDERS, group="by-hand", prefetch=5, on_invalid="raise") as messages:
            messages.prefetch = 10
        async with broker.subscribe(EMAILS) as hand:
            for email in await hand.receive(limit=100, timeout=1):
                async with email.process(retry=RetryPolicy(attempts=1)):
                    await email.publish(ORDERS, Order("a", 1))


async def looking() -> None:
    async with connect("memory://") as broker:
        async for letter in broker.browse(EMAILS.dead_letters, limit=10):
            assert_type(letter, Letter[Email])
            print(letter.dead.reason, letter.dead.first_failed, letter.body)
        async for order_letter in broker.browse(ORDERS.dead_letters("billing")):
            print(order_letter.value.total)
        async for stored in broker.browse(ORDERS, start=Start.position("p")):
            assert_type(stored, Stored[Order])
        report = await broker.redrive(
            EMAILS.dead_letters,
            where=lambda letter: letter.dead.error == "TimeoutError",
            limit=10,
            to=EMAILS,
            dry_run=True,
        )
        assert_type(report, RedriveReport)
        assert_type(await broker.backlog(ORDERS, "billing"), Backlog)
        assert_type(await broker.backlog(EMAILS), Backlog)
        assert_type(await broker.backlog(EMAILS.dead_letters), Backlog)
        assert_type(await broker.purge(EMAILS), int)
        assert_type(await broker.health(), Health)
        await broker.declare(ORDERS, EMAILS)
        await broker.delete(ORDERS, "billing")
        await broker.delete(EMAILS)
        await broker.seek(ORDERS, "billing", Start.LATEST)


async def calling_handlers(order: Message[Order], email: Message[Email]) -> None:
    """The decorator gives the very function back."""
    assert_type(await bill(order, Database()), None)
    assert_type(await quote(order), float)
    task = asyncio.create_task(send(email))
    await task
    wider: Message[object] = order
    print(wider)


def from_threads() -> None:
    with connect_blocking("memory://", options={}, declare="auto") as broker:
        assert_type(broker.publish(ORDERS, Order("o1", 10.0), key="k", timeout=3), Receipt)
        assert_type(broker.publish(EMAILS, Email("a", "b"), delay=60, ttl=3, priority=0), Receipt)
        assert_type(broker.publish_many(ORDERS, [Order("a", 1)]), list[Receipt | BrokerError])
        assert_type(broker.publish_many(EVENTS, [EVENTS.outgoing(Created("x"))]), list[Receipt | BrokerError])
        assert_type(broker.request(QUOTES, Order("o2", 3.0), timeout=2), float)
        print(broker.request(QUOTES, Order("o2", 3.0), timeout=2))


if __name__ == "__main__":
    brokerkit.run(service, "kafka+ssl://k1:9092,k2:9092", drain=3)
    brokerkit.run(service, connect("memory://"))
    brokerkit.run(service)
