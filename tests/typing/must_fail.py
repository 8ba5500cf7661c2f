"""Misuse, one a line: each line marked ``# fails`` must be an error for both checkers, and no other line may be one.

``# fails only in pyright`` marks what mypy cannot see.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from addresses import (
    EMAILS,
    EVENTS,
    MAYBES,
    ORDERS,
    QUOTES,
    ROWS,
    Base,
    Created,
    Database,
    Derived,
    Email,
    Order,
    Row,
)

import brokerkit
from brokerkit import (
    EVERY_REPLICA,
    Batch,
    Message,
    Nack,
    Queue,
    Reject,
    Reply,
    RetryPolicy,
    Service,
    Start,
    Topic,
    connect,
)
from brokerkit.blocking import connect as connect_blocking

broker = connect("memory://")
blocking = connect_blocking("memory://")
bare = Service("bare")


@asynccontextmanager
async def resources() -> AsyncGenerator[Database]:
    yield Database()


service = Service("billing", lifespan=resources)


def take_text(text: str) -> None: ...
def take_number(number: float) -> None: ...
def take_email(email: Email) -> None: ...


# ------------------------------------------------------------------ addresses

Topic("e", "Crated")  # fails: text that names no type
Topic("e", 3)  # fails: a value instead of a type
Topic("e")  # fails: no type
Topic("e", Order, partitons=3)  # fails: misspelt
Topic("e", Order, partitions="8")  # fails: text instead of a number
Topic("e", Order, priorities=3)  # fails: an option of queues
Topic("e", Order, lease=3)  # fails: an option of queues
Topic("e", Order, reply=float)  # fails: an option of queues
Topic("e", Order, codec=b"json")  # fails: no codec
Queue("e", Order, partitions=3)  # fails: an option of topics
Queue("e", Order, retention=3)  # fails: an option of topics
Queue("e", Order, reply=3.0)  # fails: a value instead of a type
Queue("e", Order, reply=float, dedup=60)  # fails: a queue that replies has no dedup
Queue("e", Order, reply_codec=None)  # fails: a codec of replies without replies
ORDERS.dead_letters()  # fails: no group
EMAILS.dead_letters("group")  # fails: a queue has no groups
ORDERS.outgoing(Email("a", "b"))  # fails: another payload
ORDERS.outgoing(Order("a", 1), delay=3)  # fails: an option of queues
EMAILS.outgoing(Email("a", "b"), key="k")  # fails: an option of topics
Topic("e", Topic[Order].name)  # fails: a name instead of a type

of_derived = Topic("d", Derived)
of_base: Topic[Base] = of_derived  # fails: a topic is written to and read from, so it is invariant
queue_of_base: Queue[Base] = Queue("q", Derived, reply=float)  # fails: it replies, the annotation says it does not
wrong_reply: Queue[Order, Reply[str]] = QUOTES  # fails: another reply


def take_topic_of_base(topic: Topic[Base]) -> None: ...


take_topic_of_base(of_derived)  # fails: invariant

# ------------------------------------------------------------------ policies

RetryPolicy(3)  # fails: by keyword only
RetryPolicy(attempts=3, wait_inital=1)  # fails: misspelt
RetryPolicy(on="TimeoutError")  # fails: text instead of a class
Start.at("2024-01-01")  # fails: text instead of a datetime
Start.position(3)  # fails: a number instead of text
Batch(max="10")  # fails: text instead of a number
Batch()  # fails: no max
Nack(30)  # fails: by keyword only
Reject()  # fails: no reason

# ------------------------------------------------------------------ handlers


async def on_order(message: Message[Order]) -> None: ...
async def on_order_with_database(message: Message[Order], db: Database) -> None: ...
async def on_order_with_text(message: Message[Order], db: str) -> None: ...
async def on_email(message: Message[Email]) -> None: ...
async def on_created(message: Message[Created]) -> None: ...
async def gives_text(message: Message[Order]) -> str:
    raise NotImplementedError


async def gives_float(message: Message[Order]) -> float:
    raise NotImplementedError


async def may_give_none(message: Message[Order]) -> float | None: ...
async def on_batch(messages: Sequence[Message[Order]]) -> None: ...
async def on_list(messages: list[Message[Order]]) -> None: ...
async def on_three(message: Message[Order], db: Database, more: int) -> None: ...
async def on_nothing() -> None: ...
async def on_keyword(message: Message[Order], *, db: Database) -> None: ...
async def on_value(order: Order) -> None: ...
async def on_email_with_more(more: int, message: Message[Email]) -> None: ...
async def generates(message: Message[Order]) -> AsyncGenerator[float]:
    yield 1.0


def plainly_gives_text(message: Message[Order]) -> str:
    raise NotImplementedError


def plainly_on_email(message: Message[Email]) -> None: ...


class Handlers:
    async def on_email(self, message: Message[Email]) -> None: ...


class InTheBody:
    async def handler(self, message: Message[Order]) -> None: ...

    service.subscribe(ORDERS)(handler)  # fails: a method of no object


service.subscribe(ORDERS)(on_email)  # fails: another payload
service.subscribe(ORDERS)(plainly_on_email)  # fails: another payload
service.subscribe(ORDERS)(Handlers().on_email)  # fails: another payload
service.subscribe(ORDERS)(partial(on_email_with_more, 1))  # fails only in pyright: another payload
service.subscribe(EVENTS)(on_created)  # fails: half of a union
service.subscribe(ORDERS)(on_value)  # fails: the value instead of the message
service.subscribe(QUOTES)(gives_text)  # fails: another reply
service.subscribe(QUOTES)(plainly_gives_text)  # fails: another reply
service.subscribe(QUOTES)(lambda message: message.value.id)  # fails: another reply
service.subscribe(QUOTES)(may_give_none)  # fails: the reply may be missing
service.subscribe(QUOTES)(on_order)  # fails: no reply
service.subscribe(QUOTES)(generates)  # fails: a generator
service.subscribe(ORDERS)(gives_float)  # fails: a reply that nobody gets
service.subscribe(ORDERS)(on_order_with_text)  # fails: other resources
bare.subscribe(ORDERS)(on_order_with_database)  # fails: resources without a lifespan
service.subscribe(ORDERS)(on_keyword)  # fails: resources by keyword
service.subscribe(ORDERS)(on_three)  # fails: three parameters
service.subscribe(ORDERS)(on_nothing)  # fails: no parameter
service.subscribe(ORDERS)(on_batch)  # fails: a batch without batch=
service.subscribe(ORDERS, batch=Batch(10))(on_order)  # fails: one message with batch=
service.subscribe(ORDERS, batch=Batch(10))(on_list)  # fails: a list where a Sequence comes


@service.subscribe  # fails: no address
async def without_parentheses(message: Message[Order]) -> None: ...


# ------------------------------------------------------------------ services

service.subscribe(QUOTES, batch=Batch(10))  # fails: batches have no replies
service.subscribe(ORDERS, batch=10)  # fails: a number instead of a Batch
service.subscribe(EMAILS, start=Start.LATEST)  # fails: an option of topics
service.subscribe(EMAILS, group="group")  # fails: an option of topics
service.subscribe(EMAILS, group=EVERY_REPLICA)  # fails: an option of topics
service.subscribe(ORDERS, start="earliest")  # fails: text instead of a Start
service.subscribe(ORDERS, concurency=3)  # fails: misspelt
service.subscribe(ORDERS, concurrency="3")  # fails: text instead of a number
service.subscribe(ORDERS, retry=3)  # fails: a number instead of a RetryPolicy
service.subscribe(ORDERS, max_deliveries=None)  # fails: it always has a limit
service.subscribe(ORDERS.dead_letters("group"))  # fails: dead letters are browsed
service.subscribe("orders")  # fails: a name instead of an address
service.include("other")  # fails: a name instead of a service
service.running("memory://")  # fails: a URL instead of a broker
service.running(broker, drian=3)  # fails: misspelt
Service("x", lifespan=Database)  # fails: no context manager
Service()  # fails: no name
brokerkit.run(service, drian=3)  # fails: misspelt
brokerkit.run(broker)  # fails: a broker instead of a service
connect("memory://", declare="maybe")  # fails: no such mode
connect("memory://", delcare="auto")  # fails: misspelt
connect()  # fails: no URL


async def publishing() -> None:
    await broker.publish(ORDERS, Email("a", "b"))  # fails: another payload
    await broker.publish(ORDERS, Order("a", "b"))  # fails: another field
    await broker.publish(EVENTS, Order("a", 1))  # fails: not in the union
    await broker.publish(ROWS, Row(b=1))  # fails: misspelt
    await broker.publish(ORDERS, None)  # fails: None is not admitted
    await broker.publish(ORDERS)  # fails: no value
    await broker.publish(ORDERS, Order("a", 1), delay=60)  # fails: an option of queues
    await broker.publish(ORDERS, Order("a", 1), ttl=60)  # fails: an option of queues
    await broker.publish(ORDERS, Order("a", 1), priority=1)  # fails: an option of queues
    await broker.publish(EMAILS, Email("a", "b"), key="k")  # fails: an option of topics
    await broker.publish(EMAILS, Email("a", "b"), dely=3)  # fails: misspelt
    await broker.publish(EMAILS, Email("a", "b"), headers={"a": b"b"})  # fails: headers are text
    await broker.publish("orders", Order("a", 1))  # fails: a name instead of an address
    await broker.publish(ORDERS.dead_letters("group"), Order("a", 1))  # fails: dead letters take no messages
    await broker.publish_many(ORDERS, [Email("a", "b")])  # fails: another payload
    await broker.publish_many(ORDERS, [EMAILS.outgoing(Email("a", "b"))])  # fails: another payload
    await broker.publish_many(ORDERS, Order("a", 1))  # fails: one value
    await broker.publish_many(ORDERS, [Order("a", 1)], key="k")  # fails: an option of each item
    await broker.request(EMAILS, Email("a", "b"), timeout=1)  # fails: it does not reply
    await broker.request(ORDERS, Order("a", 1), timeout=1)  # fails: a topic does not reply
    await broker.request(QUOTES, Order("a", 1))  # fails: no timeout
    await broker.request(QUOTES, Email("a", "b"), timeout=1)  # fails: another payload
    take_text(await broker.request(QUOTES, Order("a", 1), timeout=1))  # fails: the reply is a float
    take_number(await broker.request(MAYBES, Order("a", 1), timeout=1))  # fails: the reply may be None


async def reading() -> None:
    broker.subscribe(EMAILS, start=Start.EARLIEST)  # fails: an option of topics
    broker.subscribe(EMAILS, group="group")  # fails: an option of topics
    broker.subscribe(EMAILS, until_end=True)  # fails: an option of topics
    broker.subscribe(EMAILS, on_invalid="skip")  # fails: an option of topics
    broker.subscribe(ORDERS, start="earliest")  # fails: text instead of a Start
    broker.subscribe(ORDERS, on_invalid="drop")  # fails: no such way
    broker.subscribe(ORDERS, group=EVERY_REPLICA)  # fails: an option of services
    broker.subscribe(EMAILS.dead_letters)  # fails: dead letters are browsed
    async with broker.subscribe(ORDERS) as messages:
        for wrong in messages:  # fails: for instead of async for
            print(wrong)
        await messages.receive(10)  # fails: by keyword only
        async for message in messages:
            take_email(message.value)  # fails: another payload
            message.value = Order("a", 1)  # fails: a message is read
            await message.publish(EMAILS, Order("a", 1))  # fails: another payload
            await message.publish(ORDERS, Order("a", 1), delay=3)  # fails: an option of queues
            await message.publish(ORDERS, Order("a", 1), timeout=3)  # fails: an option of brokers
            await message.nack("later")  # fails: text instead of seconds
            await message.reject()  # fails: no reason
            message.proces()  # fails: misspelt
            print(message.dead)  # fails: it lives


async def looking() -> None:
    broker.browse(ORDERS.dead_letters)  # fails: no group
    broker.browse(EMAILS, start=Start.EARLIEST)  # fails: an option of topics
    async for letter in broker.browse(EMAILS.dead_letters):
        await letter.nack()  # fails: nothing is owned
        await letter.ack()  # fails: nothing is owned
        print(letter.dead.reson)  # fails: misspelt
    async for stored in broker.browse(EMAILS):
        await stored.ack()  # fails: nothing is owned
        print(stored.dead)  # fails: it lives
    await broker.redrive(EMAILS, limit=1)  # fails: no dead letters
    await broker.redrive(EMAILS.dead_letters, where=lambda letter: letter.dead.eror == "x")  # fails: misspelt
    await broker.redrive(EMAILS.dead_letters, to=QUOTES)  # fails: another payload
    await broker.redrive(EMAILS.dead_letters, to=ORDERS)  # fails: never to a topic
    await broker.backlog(ORDERS)  # fails: no group
    await broker.backlog(EMAILS, "group")  # fails: a queue has no groups
    await broker.delete(EMAILS, "group")  # fails: a queue has no groups
    await broker.seek(EMAILS, "group", Start.EARLIEST)  # fails: a queue has no position
    await broker.purge(ORDERS)  # fails: a topic is not emptied
    await broker.declare("orders")  # fails: a name instead of an address


# ------------------------------------------------------------------ from threads

blocking.publish(ORDERS, Email("a", "b"))  # fails: another payload
blocking.publish(ORDERS, Order("a", 1), delay=60)  # fails: an option of queues
blocking.publish(EMAILS, Email("a", "b"), key="k")  # fails: an option of topics
blocking.publish(EMAILS, Email("a", "b"), dely=3)  # fails: misspelt
blocking.publish_many(ORDERS, [Email("a", "b")])  # fails: another payload
blocking.request(EMAILS, Email("a", "b"), timeout=1)  # fails: it does not reply
blocking.request(QUOTES, Order("a", 1))  # fails: no timeout
take_text(blocking.request(QUOTES, Order("a", 1), timeout=1))  # fails: the reply is a float
connect_blocking("memory://", declare="maybe")  # fails: no such mode


async def in_a_coroutine() -> None:
    await blocking.publish(ORDERS, Order("a", 1))  # fails: it is not awaited
    async with blocking:  # fails: with, not async with
        pass
    with broker:  # fails: async with, not with
        pass
