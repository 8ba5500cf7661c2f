"""OPTIONS: every option of publishing, subscribing and addresses, on every kind of address.

`_options.OPTIONS` is the option table.  An option that is not in it fails the suite, and so does one without a test of its name here.
A test shows the effect of an option where the table says that it works, and a refusal everywhere else: nothing is ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest

from ..._plan import Plan
from ...clock import current
from ...errors import BrokerUnavailable, ConfigError, DecodeError
from ...events import NothingSettled
from ...message import Message
from ...policy import EVERY_REPLICA, MAX_PREFETCH, Batch, RetryPolicy, Start
from ._harness import Harness, Kind
from ._options import OPTIONS, signatures, staged, works
from ._runner import Suite, seeds
from .address_options import AddressOptions


class Options(Suite):
    @seeds(1)
    async def test_every_option_is_in_the_table_and_has_a_test(self, system: Harness) -> None:
        """A new option must come with a column for each kind of address."""
        assert signatures() == set(OPTIONS)
        for option in OPTIONS:
            test = f"test_{option.replace('.', '_')}"
            assert hasattr(Options, test) or hasattr(AddressOptions, test), f"no test of {option}"

    @seeds(1)
    async def test_every_way_to_publish_has_the_same_options(self, system: Harness) -> None:
        """What a handler stages and what publish_many takes can all be said to publish, and the other way round."""
        assert staged() == {option for option in OPTIONS if option.startswith("publish.")} - {"publish.timeout"}

    async def publishing(self, system: Harness, kind: Kind, option: str, address: Any, **options: Any) -> Any:
        """Publish with an option, and return the message that comes; None where the option is refused, as it must be."""
        error = works(system, option, kind)
        async with system.connect() as broker, system.subscribe(broker, system.address(kind, "plain")) as unused:
            if error is not None:
                with pytest.raises(error):
                    await broker.publish(address, "value", **options)
                await system.nothing(unused)
                return None
            await broker.publish(address, "value", **options)
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                await message.ack()
                return message

    async def test_publish_key(self, system: Harness, kind: Kind) -> None:
        """A topic's message shows its key; a queue has none."""
        message = await self.publishing(system, kind, "publish.key", system.address(kind), key="kéy")
        assert message is None or message.key == "kéy"

    async def test_publish_id(self, system: Harness, kind: Kind) -> None:
        """The message has the id that it was given."""
        message = await self.publishing(system, kind, "publish.id", system.address(kind), id="my id")
        assert message.id == "my id"

    async def test_publish_headers(self, system: Harness, kind: Kind) -> None:
        """The message has the headers that it was given, and shows no others."""
        message = await self.publishing(system, kind, "publish.headers", system.address(kind), headers={"a": "b"})
        assert message.headers == {"a": "b"}

    async def test_publish_delay(self, system: Harness, kind: Kind) -> None:
        """A queue's message comes after its delay, in seconds and as a time."""
        for as_time in (False, True):
            now = datetime.fromtimestamp(current().time()).astimezone()
            delay = now + timedelta(seconds=system.quiet) if as_time else system.quiet
            began = system.now()
            message = await self.publishing(system, kind, "publish.delay", system.address(kind), delay=delay)
            assert message is None or system.now() - began >= system.quiet * 0.9

    async def test_publish_ttl(self, system: Harness, kind: Kind) -> None:
        """A queue's message that is handled in time is handled."""
        message = await self.publishing(system, kind, "publish.ttl", system.address(kind), ttl=system.deadline)
        assert message is None or message.value == "value"

    async def test_publish_priority(self, system: Harness, kind: Kind) -> None:
        """A queue's message of high priority comes first."""
        address: Any = system.topic() if kind == "topic" else system.queue(priorities=3)
        error = works(system, "publish.priority", kind)
        async with system.connect() as broker:
            if error is not None:
                with pytest.raises(error):
                    await broker.publish(address, "value", priority=1)
                return
            for priority in (0, 2, 1):
                await broker.publish(system.queue(priorities=3), str(priority), priority=priority)
            async with system.subscribe(broker, address, prefetch=1) as messages:
                order: list[str] = []
                for _ in range(3):
                    (message,) = await system.take(messages, 1)
                    order.append(message.value)
                    await message.ack()
        assert order == ["2", "1", "0"]

    async def test_publish_timeout(self, system: Harness, kind: Kind) -> None:
        """Without a connection the call ends at its timeout."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.publish(address, "value", timeout=system.deadline)
            await system.disconnect(broker)
            began = system.now()
            with pytest.raises(BrokerUnavailable):
                await broker.publish(address, "value", timeout=3 * system.quiet)
            assert system.now() - began <= 4 * system.quiet
            await system.reconnect(broker)
            for timeout in (0, -1, "1"):
                with pytest.raises(ConfigError):
                    await broker.publish(address, "value", timeout=timeout)  # type: ignore[arg-type]

    async def reading(self, system: Harness, kind: Kind, option: str, **options: Any) -> list[Message[str]] | None:
        """Subscribe with an option and return what comes, of one message before and one after; None where it is refused."""
        address = system.address(kind)
        error = works(system, option, kind)
        async with system.connect() as broker:
            subscribe: Any = broker.subscribe
            await system.publish(broker, address, ["before"])
            if error is not None:
                with pytest.raises(error):
                    async with subscribe(address, **options):
                        pass
                return None
            async with subscribe(address, **options) as messages:
                await system.publish(broker, address, ["after"])
                taken: list[Message[str]] = []
                while got := await messages.receive(limit=10, timeout=system.quiet):
                    taken += got
                return taken

    async def test_subscribe_group(self, system: Harness, kind: Kind) -> None:
        """A group of a topic starts at the earliest, and has a position."""
        got = await self.reading(system, kind, "subscribe.group", group="g")
        assert got is None or sorted(m.value for m in got) == ["after", "before"]

    async def test_subscribe_start(self, system: Harness, kind: Kind) -> None:
        """A reader starts where it is told to."""
        got = await self.reading(system, kind, "subscribe.start", start=Start.EARLIEST)
        assert got is None or sorted(m.value for m in got) == ["after", "before"]
        if kind == "topic":
            async with system.connect() as broker:
                with pytest.raises(ConfigError):
                    async with broker.subscribe(system.topic(), start="earliest"):  # type: ignore[call-overload]
                        pass

    async def test_subscribe_prefetch(self, system: Harness, kind: Kind) -> None:
        """So many messages are in hand at most; it may be changed."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address, prefetch=3) as messages:
            await system.publish(broker, address, [f"v{n}" for n in range(10)])
            held = list(await system.take(messages, 3))
            await system.nothing(messages)
            assert messages.prefetch == 3
            messages.prefetch = 5
            held += await system.take(messages, 2)
            await system.nothing(messages)
            messages.prefetch = 0  # nothing comes, also when nothing is in hand
            for message in held:
                await message.ack(confirm=True)
            await system.nothing(messages)
            messages.prefetch = 4
            assert len(await system.take(messages, 4)) == 4
            await system.nothing(messages)
            for bad in (0, -1, MAX_PREFETCH + 1, 1.5):
                with pytest.raises(ConfigError):
                    async with system.subscribe(broker, address, prefetch=bad):  # type: ignore[arg-type]
                        pass

    async def test_subscribe_patient(self, system: Harness, kind: Kind) -> None:
        """Of what is in hand for long a patient subscription says nothing, the other one does."""
        patient, other = system.address(kind, "patient"), system.address(kind, "other")
        plan = Plan if system.virtual else partial(Plan, lease=system.lease)
        async with system.connect() as broker:
            await system.publish(broker, patient, ["a"])
            await system.publish(broker, other, ["a"])
            with mock.patch("brokerkit._plans.Plan", plan):
                async with (
                    system.subscribe(broker, patient, prefetch=1, patient=True) as holding,
                    system.subscribe(broker, other, prefetch=1) as forgetting,
                ):
                    await system.take(holding, 1)
                    await system.take(forgetting, 1)
                    await system.eventually(lambda: system.seen(NothingSettled), within=10 * system.lease + 120)
            assert {event.address for event in system.seen(NothingSettled)} == {system.native(broker, other).name}

    async def test_subscribe_until_end(self, system: Harness, kind: Kind) -> None:
        """A reader ends after what was there on entering."""
        got = await self.reading(system, kind, "subscribe.until_end", start=Start.EARLIEST, until_end=True)
        assert got is None or [m.value for m in got] == ["before"]

    async def test_subscribe_on_invalid(self, system: Harness, kind: Kind) -> None:
        """An ephemeral reader raises what it cannot read, or passes it over."""
        error = works(system, "subscribe.on_invalid", kind)
        address = system.address(kind, "numbers", int)
        foreign: Any = system.topic("numbers", bytes) if kind == "topic" else system.queue("numbers", bytes)
        async with system.connect() as broker, system.connect() as other:
            subscribe: Any = broker.subscribe
            if error is not None:
                with pytest.raises(error):
                    async with subscribe(address, on_invalid="skip"):
                        pass
                return
            async with (
                subscribe(address, on_invalid="skip") as skipping,
                subscribe(address, on_invalid="raise") as raising,
            ):
                await other.publish(foreign, b"?", key="k")
                await broker.publish(system.topic("numbers", int), 7, key="k")
                assert [m.value for m in await system.take(skipping, 1)] == [7]
                with pytest.raises(DecodeError):
                    await system.take(raising, 1)
                assert [m.value for m in await system.take(raising, 1)] == [7]
            with pytest.raises(ConfigError):
                async with subscribe(address, on_invalid="ignore"):
                    pass

    async def serving(
        self, system: Harness, kind: Kind, option: str, check: Callable[[list[Message[str]]], object], **options: Any
    ) -> None:
        """Run a service with an option until *check* holds for what was handled; or see it refused."""
        address = system.address(kind)
        error = works(system, option, kind)
        handled: list[Message[str]] = []

        async def handle(message: Message[str]) -> None:
            handled.append(message)

        async with system.connect() as broker:
            await system.publish(broker, address, ["before"])
            if error is not None:
                with pytest.raises(error):
                    async with system.serve(broker, address, handle, **options):
                        pass
                assert not handled
                return
            async with system.serve(broker, address, handle, **options):
                await system.publish(broker, address, ["after"])
                await system.eventually(lambda: check(handled))
                await system.settle_down()
                assert check(handled)

    async def test_service_group(self, system: Harness, kind: Kind) -> None:
        """The group is the service's name or the one given; EVERY_REPLICA reads what comes, ephemerally."""
        await self.serving(system, kind, "service.group", lambda got: len(got) == 2, group="other")
        await self.serving(
            system, kind, "service.group", lambda got: [m.value for m in got] == ["after"], group=EVERY_REPLICA
        )

    async def test_service_start(self, system: Harness, kind: Kind) -> None:
        """A new group of a topic starts where it is told to."""
        await self.serving(
            system, kind, "service.start", lambda got: [m.value for m in got] == ["after"], start=Start.LATEST
        )

    async def test_service_concurrency(self, system: Harness, kind: Kind) -> None:
        """So many handlers run at the same time, and never more."""
        address = system.address(kind)
        running, most, done = 0, 0, 0

        async def handle(message: Message[str]) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(system.quiet / 10)
            running -= 1
            done += 1

        async with system.connect() as broker, system.serve(broker, address, handle, concurrency=3):
            await system.publish(broker, address, [f"v{n}" for n in range(12)])
            await system.eventually(lambda: done == 12)
        assert most == 3
        await self.bad(system, kind, concurrency=0)

    async def bad(self, system: Harness, kind: Kind, **options: Any) -> None:
        """Fail unless a service with *options* is refused."""

        async def handle(message: Message[str]) -> None:
            return None

        async with system.connect() as broker:
            with pytest.raises(ConfigError):
                async with system.serve(broker, system.address(kind), handle, **options):
                    pass

    async def test_service_prefetch(self, system: Harness, kind: Kind) -> None:
        """A service holds so many messages at most: the others are there for another process."""
        address = system.address(kind)
        started, go = asyncio.Event(), asyncio.Event()

        async def handle(message: Message[str]) -> None:
            started.set()
            await go.wait()

        async with system.connect() as broker, system.serve(broker, address, handle, prefetch=4):
            await system.publish(broker, address, [f"v{n}" for n in range(10)])
            await started.wait()
            await system.settle_down()
            backlog = await system.backlog(broker, address)
            assert (backlog.in_flight, backlog.waiting) in {(4, 6), (None, None)}
            go.set()
        await self.bad(system, kind, prefetch=0)

    async def test_service_retry(self, system: Harness, kind: Kind) -> None:
        """The policy says how often a message runs."""
        address = system.address(kind)
        runs: list[int] = []

        async def handle(message: Message[str]) -> None:
            runs.append(message.attempt)
            raise RuntimeError("always")

        retry = RetryPolicy(attempts=2, wait_initial=0)
        async with system.connect() as broker, system.serve(broker, address, handle, retry=retry):
            await system.publish(broker, address, ["a"])
            await system.eventually(lambda: system.browse(broker, system.letters(address)))
        assert runs == [1, 2]

    async def test_service_max_deliveries(self, system: Harness, kind: Kind) -> None:
        """A message that was in so many processes that died is dead-lettered."""
        address = system.address(kind)
        deaths = 0
        async with system.connect() as broker:
            await system.publish(broker, address, ["a"])
            for _ in range(4):
                process = system.connect()
                started = asyncio.Event()

                async def hang(message: Message[str], started: asyncio.Event = started) -> None:
                    started.set()
                    await asyncio.Event().wait()

                async with process, system.serve(process, address, hang, max_deliveries=2, drain=0):

                    async def over(started: asyncio.Event = started) -> bool:
                        return started.is_set() or bool(await system.browse(broker, system.letters(address)))

                    await system.eventually(over)
                    if not started.is_set():
                        break
                    deaths += 1
                    await system.crash(process)
            assert len(await system.browse(broker, system.letters(address))) == 1
        assert deaths == 2
        await self.bad(system, kind, max_deliveries=0)

    async def test_service_timeout(self, system: Harness, kind: Kind) -> None:
        """A run that takes longer is a failed attempt."""
        address = system.address(kind)
        runs: list[int] = []

        async def handle(message: Message[str]) -> None:
            runs.append(message.attempt)
            if message.attempt == 1:
                await asyncio.Event().wait()

        async with system.connect() as broker:
            retry = RetryPolicy(wait_initial=0)
            async with system.serve(broker, address, handle, timeout=system.quiet, retry=retry):
                await system.publish(broker, address, ["a"])
                await system.eventually(lambda: runs == [1, 2])
        await self.bad(system, kind, timeout=0)

    async def test_service_batch(self, system: Harness, kind: Kind) -> None:
        """The handler takes several messages at once, as many as it says at most."""
        address = system.address(kind)
        batches: list[int] = []

        async def handle(messages: list[Message[str]]) -> None:
            batches.append(len(messages))

        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(10)])
            async with system.serve(broker, address, handle, batch=Batch(max=4, wait=system.quiet)):
                await system.eventually(lambda: sum(batches) == 10)
        assert max(batches) == 4
