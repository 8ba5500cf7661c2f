"""SERVICES: resources, including, names, and what declare= does at the start."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ...errors import BrokerError, ConfigError, NotFound, SettingsMismatch
from ...events import DeadLettered
from ...message import Message
from ...policy import RetryPolicy
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite, needs


class Database:
    """A resource."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.open = True


class Services(Suite):
    async def test_a_handler_that_asks_for_resources_gets_what_the_lifespan_yields(
        self, system: Harness, kind: Kind
    ) -> None:
        """Those with a second required parameter, async or plain; the others are called with the message alone."""
        wants, plain, alone = (system.address(kind, name) for name in ("wants", "plain", "alone"))
        database = Database()
        calls: list[str] = []

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[Database]:
            yield database

        service: Service[Database] = Service("workers", lifespan=lifespan)

        async def with_resources(message: Message[str], db: Database) -> None:
            assert db is database
            calls.append("wants")

        service.subscribe(wants)(with_resources)

        def in_thread(message: Message[str], db: Database) -> None:
            assert db is database
            calls.append("plain")

        service.subscribe(plain)(in_thread)

        async def without(message: Message[str], optional: object = None) -> None:
            assert optional is None
            calls.append("alone")

        service.subscribe(alone)(without)

        async with system.connect() as broker, service.running(broker):
            for address in (wants, plain, alone):
                await system.publish(broker, address, ["v"])
            await system.eventually(lambda: len(calls) == 3)
        assert sorted(calls) == ["alone", "plain", "wants"]
        assert not system.seen(DeadLettered)

    async def test_the_lifespan_is_entered_once_and_left_after_the_drain(self, system: Harness, kind: Kind) -> None:
        """Open before the first handler runs, and until the last one has finished; anew for each run."""
        address = system.address(kind)
        opened: list[Database] = []
        finished: list[bool] = []

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[Database]:
            database = Database()
            opened.append(database)
            yield database
            database.open = False

        service: Service[Database] = Service("workers", lifespan=lifespan)

        async def handler(message: Message[str], db: Database) -> None:
            started.set()
            await asyncio.sleep(system.quiet / 2)
            finished.append(db.open)

        service.subscribe(address, concurrency=3)(handler)

        async with system.connect() as broker:
            for _ in range(2):
                started = asyncio.Event()
                async with service.running(broker, drain=10 * system.quiet):
                    await system.publish(broker, address, ["a", "b", "c"])
                    await started.wait()
        assert len(opened) == 2
        assert finished
        assert all(finished)
        assert not any(database.open for database in opened)

    async def test_an_error_of_the_lifespans_end_comes_out_as_it_is(self, system: Harness, kind: Kind) -> None:
        """Not in a group of ours; the messages are settled by then."""
        address = system.address(kind)
        handled: list[str] = []

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            yield
            raise LookupError("cannot close")

        service: Service[None] = Service("workers", lifespan=lifespan)

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        service.subscribe(address)(handler)

        async with system.connect() as broker:
            with pytest.raises(LookupError, match="cannot close"):
                async with service.running(broker):
                    await system.publish(broker, address, ["v"])
                    await system.eventually(lambda: handled)
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)

    async def test_an_included_service_keeps_its_name_group_lifespan_and_resources(
        self, system: Harness, kind: Kind
    ) -> None:
        """They run together and drain together."""
        address = system.address(kind)
        mine, theirs = Database(), Database()

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[Database]:
            yield mine

        @asynccontextmanager
        async def other_lifespan() -> AsyncIterator[Database]:
            yield theirs
            theirs.open = False

        main: Service[Database] = Service("main", lifespan=lifespan)
        other: Service[Database] = Service("other", lifespan=other_lifespan)
        second = address if kind == "topic" else system.queue("second")

        async def one(message: Message[str], db: Database) -> None:
            db.rows.append(message.value)

        main.subscribe(address)(one)

        async def two(message: Message[str], db: Database) -> None:
            db.rows.append(message.value)

        other.subscribe(second)(two)

        main.include(other)
        async with system.connect() as broker, main.running(broker):
            await system.publish(broker, address, ["v"])
            if kind == "queue":
                await system.publish(broker, second, ["v"])
            await system.eventually(lambda: mine.rows == ["v"] and theirs.rows == ["v"])
        assert not theirs.open
        if kind == "topic":
            async with system.connect() as broker:
                for group in ("main", "other"):
                    async with system.subscribe(broker, address, group=group) as messages:
                        await system.nothing(messages)

    async def test_including_in_a_circle_or_twice_is_refused(self, system: Harness) -> None:
        """ConfigError, at once."""
        a, b = Service[None]("a"), Service[None]("b")
        a.include(b)
        for outer, inner in ((a, b), (b, a), (a, a)):
            with pytest.raises(ConfigError):
                outer.include(inner)

    async def test_two_services_of_one_name_share_the_work(self, system: Harness, kind: Kind) -> None:
        """The name is the group: in two processes, or twice in one, each message is handled once."""
        address = system.address(kind)
        handled: Counter[str] = Counter()

        async def handler(message: Message[str]) -> None:
            handled[message.value] += 1
            await asyncio.sleep(0.001)

        async with (
            system.connect() as one,
            system.connect() as two,
            system.serve(one, address, handler, name="billing"),
            system.serve(one, address, handler, name="billing"),
            system.serve(two, address, handler, name="billing"),
        ):
            await system.settle_down()
            await system.publish(two, address, [f"v{n}" for n in range(60)])
            await system.eventually(lambda: len(handled) == 60)
            await system.settle_down()
        assert set(handled.values()) == {1}

    @needs("topic")
    async def test_two_handlers_of_a_service_on_one_topic_share_its_group(self, system: Harness) -> None:
        """Unless they name groups of their own: then each sees everything."""
        topic = system.topic()
        shared: Counter[str] = Counter()
        own: Counter[str] = Counter()
        service: Service[None] = Service("workers")

        @service.subscribe(topic)
        async def one(message: Message[str]) -> None:
            shared[message.value] += 1

        @service.subscribe(topic)
        async def two(message: Message[str]) -> None:
            shared[message.value] += 1

        @service.subscribe(topic, group="audit")
        async def audit(message: Message[str]) -> None:
            own[message.value] += 1

        async with system.connect() as broker, service.running(broker):
            await system.publish(broker, topic, [f"v{n}" for n in range(40)])
            await system.eventually(lambda: len(shared) == 40 and len(own) == 40)
            await system.settle_down()
        assert set(shared.values()) == {1}
        assert set(own.values()) == {1}

    async def test_a_failed_message_of_one_handler_is_nothing_to_the_others(self, system: Harness, kind: Kind) -> None:
        """Each subscription has retries and dead letters of its own."""
        bad, good = system.address(kind, "bad"), system.address(kind, "good")
        handled: list[str] = []
        service: Service[None] = Service("workers")

        async def fail(message: Message[str]) -> None:
            raise LookupError

        service.subscribe(bad, retry=RetryPolicy(attempts=1))(fail)

        async def work(message: Message[str]) -> None:
            handled.append(message.value)

        service.subscribe(good)(work)

        async with system.connect() as broker, service.running(broker):
            for number in range(5):
                await system.publish(broker, bad, [f"b{number}"])
                await system.publish(broker, good, [f"g{number}"])
            await system.eventually(lambda: len(handled) == 5 and len(system.seen(DeadLettered)) == 5)
            assert await system.browse(broker, system.letters(good)) == []

    async def test_a_service_checks_its_addresses_at_its_start(self, system: Harness, kind: Kind) -> None:
        """declare="check": NotFound and SettingsMismatch before any handler runs; nothing is created."""
        address = system.address(kind)
        different = (
            system.topic(partitions=7) if kind == "topic" else system.queue(lease=system.lease + 3, priorities=1)
        )
        lives: list[str] = []
        service: Service[None] = Service("workers")

        async def first(message: Message[str]) -> None:
            lives.append(message.value)

        service.subscribe(system.target("fine") if kind == "topic" else system.topic("fine"))(first)

        async def second(message: Message[str]) -> None:
            lives.append(message.value)

        service.subscribe(different)(second)

        async with system.connect() as admin:
            await admin.declare(service.registrations[0].address)
            async with system.connect(declare="check") as broker:
                with pytest.raises(NotFound, match=address.name):
                    async with service.running(broker):
                        pass
                assert await system.driver(broker).describe(system.native(broker, address)) is None
            await admin.declare(address)
            described = await system.driver(admin).describe(system.native(admin, address))
        if described and {"partitions", "lease"} & set(described):
            async with system.connect(declare="check") as broker:
                with pytest.raises(SettingsMismatch, match=address.name):
                    async with service.running(broker):
                        pass
        assert not lives

    async def test_with_declare_never_nothing_is_asked_and_nothing_created(self, system: Harness, kind: Kind) -> None:
        """It works on what is there; what is not there is NotFound when it is used."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with system.connect(declare="never") as broker:
            with pytest.raises(NotFound):
                async with system.serve(broker, address, handler):
                    pass
            assert await system.driver(broker).describe(system.native(broker, address)) is None
        async with system.connect() as admin:
            await admin.declare(address)
        async with system.connect(declare="never") as broker, system.serve(broker, address, handler):
            await system.publish(broker, address, ["v"])
            await system.eventually(lambda: handled == ["v"])

    async def test_an_unknown_mode_of_declaring_is_refused(self, system: Harness) -> None:
        """By connect, before any I/O."""
        for mode in ("yes", "", None, True):
            with pytest.raises(ConfigError):
                system.connect(declare=mode)

    async def test_prefixed_services_do_not_meet(self, system: Harness, kind: Kind) -> None:
        """Addresses, groups and dead letters of staging are not those of production."""
        address = system.address(kind)
        handled: list[tuple[str, str]] = []

        def handler(where: str) -> Any:
            async def handle(message: Message[str]) -> None:
                handled.append((where, message.value))
                if message.value == "bad":
                    raise LookupError

            return handle

        policy = RetryPolicy(attempts=1)
        async with (
            system.connect(options={"prefix": "staging."}) as staging,
            system.connect() as production,
            system.serve(staging, address, handler("staging"), retry=policy),
            system.serve(production, address, handler("production"), retry=policy),
        ):
            await system.publish(staging, address, ["bad", "s"])
            await system.publish(production, address, ["p"])
            await system.eventually(lambda: len(handled) == 3 and system.seen(DeadLettered))
            await system.settle_down()
            assert sorted(handled) == [("production", "p"), ("staging", "bad"), ("staging", "s")]
            assert len(await system.browse(staging, system.letters(address))) == 1
            assert await system.browse(production, system.letters(address)) == []

    async def test_a_service_that_fails_to_start_leaves_nothing_behind(self, system: Harness, kind: Kind) -> None:
        """One bad subscription among good ones: an error, and the good ones do not run on."""
        good, missing = system.address(kind, "good"), system.address(kind, "missing")
        handled: list[str] = []
        service: Service[None] = Service("workers")

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        service.subscribe(good)(handler)
        service.subscribe(missing)(handler)
        async with system.connect() as admin, system.connect(declare="never") as broker:
            await admin.declare(good)
            with pytest.raises(BrokerError):
                async with service.running(broker):
                    pass
            await system.publish(admin, good, ["v"])
            await system.settle_down()
            assert not handled
            assert (await broker.health()).ok
            async with system.subscribe(admin, good) as messages:
                assert len(await system.take(messages, 1)) == 1
