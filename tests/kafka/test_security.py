"""Passwords, certificates and rights, as a program meets them: what it is told, and that it goes on when they are back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from brokerkit import (
    AuthenticationError,
    AuthorizationError,
    Broker,
    BrokerError,
    BrokerUnavailable,
    Message,
    PublishUnknown,
    Reject,
    RetryPolicy,
    Service,
    Start,
    Topic,
    connect,
)
from tests.servers.kafka import Network, shared_kafka
from tests.servers.kafka.wire import Resource

from .guests import Guest, guest

CANARY: Final = "s3cr3t-Canary/ä=,+"
"""With characters that URLs, SCRAM and JAAS treat specially."""
PATIENCE: Final = 20.0
ORDERS: Final = Topic("orders", str, partitions=1)

pytestmark = pytest.mark.asyncio


@pytest.fixture
def visitor() -> Iterator[Guest]:
    """A user with all rights of README and an empty topic."""
    with guest() as made:
        made.allow()
        made.create("orders")
        yield made


async def eventually(look: Callable[[], bool]) -> None:
    """Return when *look* says so."""
    async with asyncio.timeout(PATIENCE):
        while not look():
            await asyncio.sleep(0.02)


async def works(act: Callable[[], Awaitable[object]], *, unless: type[BrokerError] = AuthorizationError) -> None:
    """Do something again and again until it works: brokers need a moment to hear of a change."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await act()
            except unless:
                await asyncio.sleep(0.1)
            else:
                return


async def fails(act: Callable[[], Awaitable[object]], kind: type[BrokerError]) -> BrokerError:
    """Do something again and again until it fails as *kind*, and return the error."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await act()
            except kind as error:
                return error
            except (BrokerUnavailable, PublishUnknown):  # what was under way while the network broke
                pass
            await asyncio.sleep(0.1)


# ---------------------------------------------------------------------- who one is


async def opened(url: str, **options: object) -> None:
    """Connect and disconnect."""
    async with connect(url, options=options):
        pass


@pytest.mark.parametrize("listener", ["SASL", "SASLSSL"])
async def test_a_wrong_password_is_told_from_all_else(visitor: Guest, listener: str) -> None:
    kafka = visitor.endpoints
    tls = listener == "SASLSSL"
    ca: dict[str, object] = {"ca_file": kafka.authority} if tls else {}
    good = visitor.url("SASLSSL" if tls else "SASL")
    await opened(good, **ca)
    begun = time.monotonic()
    with pytest.raises(
        AuthenticationError, match=rf"127\.0\.0\.1:\d+ as user {visitor.name} by SCRAM-SHA-512"
    ) as wrong:
        await opened(good.replace("guest-secret", "wrong"), **ca)
    assert time.monotonic() - begun < 4.5  # seconds after which connecting would have been given up: 5
    assert not wrong.value.retryable
    with pytest.raises(AuthenticationError, match=r"as user nobody by"):
        await opened(good.replace(f"{visitor.name}:", "nobody:"), **ca)
    port = good.rpartition("?")[0].rpartition(":")[2]
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        await opened(good.replace(port, "1"), **ca)
    if tls:
        with pytest.raises(BrokerUnavailable, match=r"certificate was refused.*ca_file="):
            await opened(good)
        with pytest.raises(BrokerUnavailable, match=r"certificate was refused.*ca_file="):
            await opened(good, ca_file=kafka.stranger)


async def test_a_wrong_password_is_not_tried_at_one_broker_after_the_other(visitor: Guest) -> None:
    async with Network(visitor.endpoints, "SASL") as network:
        url = visitor.url(network=network).replace("guest-secret", "wrong")
        host = url.partition("@")[2].partition("?")[0]
        with pytest.raises(AuthenticationError):
            await opened(url.replace(host, f"{host},localhost:{host.rpartition(':')[2]}"))
        assert network.seen[36] <= 2  # one log-in by SCRAM


async def test_a_first_host_that_is_away_does_not_matter(visitor: Guest) -> None:
    url = visitor.url()
    host = url.partition("@")[2].partition("?")[0]
    async with connect(url.replace(host, f"127.0.0.1:1,{host}")) as broker:
        await broker.publish(ORDERS, "value")


async def test_all_of_it_works_with_a_certificate_and_no_password() -> None:
    kafka = shared_kafka()
    prefix = f"mtls.{uuid.uuid4().hex[:12]}."
    files: dict[str, object] = {"ca_file": kafka.authority, "cert_file": kafka.client[0], "key_file": kafka.client[1]}
    async with connect(kafka.url("MTLS"), options={**files, "prefix": prefix}) as broker:
        await broker.publish(ORDERS, "value")
        async with broker.subscribe(ORDERS, group="billing") as messages:
            (message,) = await messages.receive(timeout=PATIENCE)
            await message.ack(confirm=True)
        await broker.delete(ORDERS)


async def test_a_password_that_changes_under_a_running_program(
    visitor: Guest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that are open stay so; new ones need the new password, which is asked for at a bearable pace."""
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "password"
    path.write_text(visitor.password)
    async with Network(visitor.endpoints, "SASL") as network:
        url = visitor.url(network=network).replace(f":{visitor.password}@", "@")
        async with connect(url, options={"password_file": str(path)}) as broker:
            await broker.publish(ORDERS, "before")
            visitor.passwd(CANARY)
            await broker.publish(ORDERS, "still logged in")
            network.reset()
            await fails(lambda: broker.publish(ORDERS, "refused", timeout=5), AuthenticationError)
            before = network.seen[36]
            await asyncio.sleep(1)
            assert network.seen[36] - before <= 4  # two of them are one log-in
            path.write_text(CANARY)
            await works(lambda: broker.publish(ORDERS, "after", timeout=5), unless=BrokerError)
            async with broker.subscribe(ORDERS, group="billing") as messages:
                got = await taken(messages.receive, 3)
            assert [message.value for message in got] == ["before", "still logged in", "after"]
    assert CANARY not in caplog.text


async def taken(receive: Callable[..., Awaitable[Sequence[Message[str]]]], count: int) -> list[Message[str]]:
    """Receive as many messages, and say that they are done."""
    found: list[Message[str]] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            for message in await receive(limit=count - len(found), timeout=PATIENCE):
                await message.ack(confirm=True)
                found.append(message)
    return found


# ---------------------------------------------------------------------- secrets


async def test_a_password_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """A canary that everything is searched for: what is logged, raised, told as an event, and the repr of all that lives."""
    caplog.set_level(logging.DEBUG)
    told: list[object] = []
    errors: list[BaseException] = []
    with guest(CANARY) as visitor:
        visitor.allow()
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        async with Network(visitor.endpoints, "SASL") as network:
            async with visitor.connect(network=network, on_event=told.append) as broker:
                await broker.publish(ORDERS, "value")
                async with broker.subscribe(ORDERS, group="billing") as messages:
                    (message,) = await messages.receive(timeout=PATIENCE)
                    shown = reprs()
                    network.reset()
                    await message.reject("no good")
                    for right in (visitor.right("topic", "write"), visitor.right("topic", "create")):
                        visitor.forbid(right)
                    errors.append(await fails(lambda: broker.publish(ORDERS, "value", timeout=5), AuthorizationError))
                visitor.passwd("another")
                network.reset()
                errors.append(await fails(lambda: broker.publish(ORDERS, "value", timeout=2), AuthenticationError))
            for listener in ("SASL", "SASLSSL", "PLAIN", "SSL"):
                await kept(errors, opened(visitor.url(listener)))
    assert len(errors) == 6
    assert any("<Wire " in text for text in shown)
    assert any(text.startswith("Settings(") for text in shown)
    texts = [*shown, *map(repr, told), caplog.text, *("".join(traceback.format_exception(error)) for error in errors)]
    for secret in (CANARY, "s3cr3t"):
        for text in texts:
            assert secret not in text


async def kept(errors: list[BaseException], act: Awaitable[object]) -> None:
    """Wait for *act*, and keep what it raises."""
    try:
        await act
    except BrokerError as error:
        errors.append(error)


def reprs() -> list[str]:
    """Return what everything of brokerkit that lives says of itself."""
    gc.collect()
    every: list[object] = gc.get_objects()
    found = [each for each in every if str(type(each).__module__).startswith("brokerkit.")]
    held = [vars(each) for each in found if hasattr(each, "__dict__") and not isinstance(each, type)]
    return sorted({repr(each) for each in [*found, *held]})


# ---------------------------------------------------------------------- rights


async def publish(broker: Broker) -> None:
    await broker.publish(ORDERS, "value", timeout=10)


async def publish_many(broker: Broker) -> None:
    for outcome in await broker.publish_many(ORDERS, ["one", "two"], timeout=10):
        if isinstance(outcome, BrokerError):
            raise outcome


async def consume(broker: Broker) -> None:
    async with broker.subscribe(ORDERS, group="billing") as messages:
        await messages.receive(timeout=PATIENCE)


async def follow(broker: Broker) -> None:
    async with broker.subscribe(ORDERS, start=Start.EARLIEST) as messages:
        await messages.receive(timeout=PATIENCE)


async def declare(broker: Broker) -> None:
    await broker.declare(Topic("others", str, partitions=1))


async def compare(broker: Broker) -> None:
    await broker.publish(ORDERS, "value")


async def browse(broker: Broker) -> None:
    async for _ in broker.browse(ORDERS):
        pass


async def backlog(broker: Broker) -> None:
    await broker.backlog(ORDERS, "billing")


async def seek(broker: Broker) -> None:
    await broker.seek(ORDERS, "billing", Start.LATEST)


async def delete(broker: Broker) -> None:
    await broker.delete(ORDERS)


async def delete_group(broker: Broker) -> None:
    await broker.delete(ORDERS, "billing")


Act = Callable[[Broker], Awaitable[None]]
MISSING: Final[list[tuple[Act, list[tuple[str, str]], str]]] = [
    (publish, [("topic", "write")], "WRITE on topic {}orders"),
    (publish_many, [("topic", "write")], "WRITE on topic {}orders"),
    (consume, [("topic", "read")], "READ on topic {}orders"),
    (consume, [("group", "read")], "READ on group {}orders..{}billing"),
    (consume, [("group", "read"), ("group", "delete")], "DESCRIBE on group {}orders..{}billing"),
    (follow, [("topic", "read")], "READ on topic {}orders"),
    (declare, [("topic", "create")], "CREATE on topic {}others"),
    (compare, [("topic", "describe_configs")], "DESCRIBE_CONFIGS on topic {}orders"),
    (browse, [("topic", "read")], "READ on topic {}orders"),
    (backlog, [("group", "read"), ("group", "delete")], "DESCRIBE on group {}orders..{}billing"),
    (seek, [("group", "read")], "READ on group {}orders..{}billing"),
    (delete, [("topic", "delete")], "DELETE on topic {}orders"),
    (delete_group, [("group", "delete")], "DELETE on group {}orders..{}billing"),
]
"""What is done, the rights that it lacks, and what is named."""


@pytest.mark.parametrize(
    "act, lacking, named", MISSING, ids=[f"{act.__name__}-{'-'.join(lacking[-1])}" for act, lacking, _ in MISSING]
)
async def test_a_missing_right_is_named_with_its_resource(act: Act, lacking: list[tuple[str, str]], named: str) -> None:
    with guest() as visitor:
        visitor.allow(*(right for right in visitor.all() if (right.resource, right.operation) not in lacking))
        visitor.create("orders")
        async with anybody(visitor) as publisher:
            await publisher.publish(ORDERS, "value")
        async with visitor.connect(declare="check" if act is compare else "never") as broker:
            begun = time.monotonic()
            with pytest.raises(AuthorizationError) as caught:
                async with asyncio.timeout(PATIENCE):
                    await act(broker)
            assert time.monotonic() - begun < 9  # what is tried again is so for ten
        assert named.replace("{}", visitor.prefix) in str(caught.value)
        assert not caught.value.retryable
        assert caught.value.__cause__ is not None


async def test_a_right_to_write_that_comes_back_is_used_at_once(visitor: Guest) -> None:
    write = visitor.right("topic", "write")
    async with Network(visitor.endpoints, "SASL") as network, visitor.connect(network=network) as broker:
        await broker.publish(ORDERS, "before", key="key")
        visitor.forbid(write)
        await fails(lambda: broker.publish(ORDERS, "refused", key="key", timeout=5), AuthorizationError)
        before = sum(network.seen.values())
        outcomes = await broker.publish_many(ORDERS, ["one", "two"], timeout=5)
        assert all(isinstance(outcome, AuthorizationError) for outcome in outcomes)
        assert sum(network.seen.values()) - before < 20
        visitor.allow(write)
        await works(lambda: broker.publish(ORDERS, "after", key="key", timeout=5))
        async with broker.subscribe(ORDERS, start=Start.EARLIEST, until_end=True) as messages:
            values = [message.value async for message in messages]
        assert values[0] == "before"
        assert values[-1] == "after"
        assert not {"one", "two"} & set(values)


async def healthy(broker: Broker) -> None:
    """Return when nothing is wrong any more."""
    async with asyncio.timeout(PATIENCE):
        while not (await broker.health()).ok:
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def handled(broker: Broker) -> AsyncIterator[list[str]]:
    """Run a service, and yield the list of what its handler has done."""
    done: list[str] = []
    service = Service("billing")

    @service.subscribe(ORDERS, retry=RetryPolicy(attempts=2, wait_initial=0.05))
    async def bill(message: Message[str]) -> None:
        done.append(message.value)

    async with service.running(broker, drain=5):
        yield done


TAKEN: Final[tuple[Resource, ...]] = ("topic", "group")


@pytest.mark.parametrize("resource", TAKEN)
async def test_a_service_goes_on_when_it_may_read_again(
    visitor: Guest, resource: Resource, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile it says what is missing, and asks at a bearable pace."""
    caplog.set_level(logging.INFO)
    right = visitor.right(resource, "read")
    async with (
        anybody(visitor) as publisher,
        Network(visitor.endpoints, "SASL") as network,
        visitor.connect(network=network) as broker,
        handled(broker) as done,
    ):
        await publisher.publish(ORDERS, "before")
        await eventually(lambda: done == ["before"])
        visitor.forbid(right)
        named = f"READ on {resource} {visitor.prefix}orders"
        await eventually(lambda: named in caplog.text)
        await publisher.publish(ORDERS, "meanwhile")
        await asyncio.sleep(1.2)  # longer than the session
        before = sum(network.seen.values())
        lines = len(caplog.records)
        await asyncio.sleep(1.5)
        assert sum(network.seen.values()) - before < 80, dict(network.seen)
        assert len(caplog.records) - lines < 20
        if resource == "group":  # else there is no consumer at the moment: the service makes another one in a while
            assert not (await broker.health()).ok
        visitor.allow(right)
        await eventually(lambda: "meanwhile" in done)
        await publisher.publish(ORDERS, "after")
        await eventually(lambda: "after" in done)
        assert done.count("after") == 1
        await healthy(broker)


async def test_a_dead_letter_waits_for_the_right_to_be_stored(visitor: Guest, caplog: pytest.LogCaptureFixture) -> None:
    create = visitor.right("topic", "create")
    visitor.forbid(create)
    letters = ORDERS.dead_letters("billing")
    async with visitor.connect() as broker:
        service = Service("billing")

        @service.subscribe(ORDERS)
        async def bill(message: Message[str]) -> None:
            raise Reject("no good")

        async with service.running(broker, drain=5):
            await broker.publish(ORDERS, "bad")
            named = f"CREATE on topic {visitor.prefix}orders..{visitor.prefix}billing..dead"
            await eventually(lambda: named in caplog.text)
            assert caplog.text.count(named) < 10
            visitor.allow(create)
            async with asyncio.timeout(PATIENCE):
                while not (found := [letter.value async for letter in broker.browse(letters)]):
                    await asyncio.sleep(0.1)
            assert found == ["bad"]


async def test_who_reads_a_topic_by_hand_is_told_and_can_begin_again(visitor: Guest) -> None:
    read = visitor.right("topic", "read")
    async with anybody(visitor) as publisher, visitor.connect() as broker:
        await publisher.publish(ORDERS, "before")
        with pytest.raises(AuthorizationError, match=rf"READ on topic {visitor.prefix}orders"):
            async with broker.subscribe(ORDERS, group="billing") as messages:
                assert [message.value for message in await taken(messages.receive, 1)] == ["before"]
                visitor.forbid(read)
                async with asyncio.timeout(PATIENCE):
                    while True:
                        await messages.receive(timeout=1)
        await publisher.publish(ORDERS, "after")
        visitor.allow(read)

        async def again() -> None:
            async with broker.subscribe(ORDERS, group="billing") as messages:
                assert [message.value for message in await taken(messages.receive, 1)] == ["after"]

        await works(again)


async def test_who_reads_in_a_group_by_hand_goes_on_when_it_may_again(visitor: Guest) -> None:
    """What it says is done meanwhile is refused by name; it stays a member in waiting, and says so of its health."""
    read = visitor.right("group", "read")
    async with anybody(visitor) as publisher, visitor.connect() as broker:
        await publisher.publish(ORDERS, "before")
        async with broker.subscribe(ORDERS, group="billing") as messages:
            (message,) = await messages.receive(timeout=PATIENCE)
            visitor.forbid(read)
            async with asyncio.timeout(PATIENCE):
                while (await broker.health()).ok:
                    await asyncio.sleep(0.05)
            with pytest.raises(AuthorizationError, match=rf"READ on group {visitor.prefix}orders"):
                await message.ack(confirm=True)
            assert not await messages.receive(timeout=1.5)
            await publisher.publish(ORDERS, "after")
            visitor.allow(read)
            values = [got.value for got in await taken(messages.receive, 1)]
            if values == ["before"]:
                values += [got.value for got in await taken(messages.receive, 1)]
            assert values[-1] == "after"
            await healthy(broker)


def anybody(visitor: Guest) -> Broker:
    """Return a broker, as who may do everything, that sees the names of *visitor*."""
    return connect(visitor.endpoints.url(), options={"prefix": visitor.prefix})
