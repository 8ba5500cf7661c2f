"""ERRORS: the same cause gives the same error on every backend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from ... import errors
from ...errors import (
    AlreadySettled,
    BrokerError,
    BrokerUnavailable,
    Closed,
    ConfigError,
    NotFound,
    PublishUnknown,
    SettingsMismatch,
)
from ...message import Message
from ...policy import Start
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite, needs

RETRYABLE = {"BrokerUnavailable", "PublishUnknown", "NotAttempted", "BufferFull"}


class Failing(Suite):
    async def test_a_missing_address_is_not_found_whatever_is_asked_of_it(self, system: Harness, kind: Kind) -> None:
        """E1: publish, subscribe, browse, backlog, and a service at its start; each names it."""
        address = system.address(kind, "missing")

        async def subscribe() -> None:
            async with system.subscribe(broker, address):
                pass

        async def serve() -> None:
            async with system.serve(broker, address, handler):
                pass

        async def browse() -> None:
            browsing: Any = broker.browse
            async for _ in browsing(address):
                pass

        async def handler(message: Message[str]) -> None:
            pass

        for mode in ("check", "never"):
            async with system.connect(declare=mode) as broker:
                calls: list[Callable[[], Awaitable[Any]]] = [
                    lambda: broker.publish(address, "v"),
                    subscribe,
                    serve,
                    browse,
                    lambda: system.backlog(broker, address),
                ]
                for call in calls:
                    with pytest.raises(NotFound, match="missing"):
                        await call()

    async def test_settling_in_two_ways_is_already_settled(self, system: Harness, kind: Kind) -> None:
        """E1: and without effect; the same way again is no error."""
        address = system.address(kind)
        outcomes: list[tuple[str, Callable[[Message[Any]], Awaitable[None]]]] = [
            ("ack", lambda m: m.ack()),
            ("nack", lambda m: m.nack()),
            ("reject", lambda m: m.reject("no")),
        ]
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            for first, settle in outcomes:
                await system.publish(broker, address, [first])
                (message,) = await system.take(messages, 1)
                await settle(message)
                for second, other in outcomes:
                    if second == first:
                        await other(message)
                    else:
                        with pytest.raises(AlreadySettled):
                            await other(message)
                if first == "nack":
                    (again,) = await system.take(messages, 1)
                    await again.ack()
            await system.nothing(messages)
            letters = await system.browse(broker, system.letters(address))
            assert [letter.value for letter in letters] == ["reject"]

    async def test_everything_on_a_closed_broker_is_closed(self, system: Harness, kind: Kind) -> None:
        """E1: before it is opened and after; no call waits, and none does anything."""
        address = system.address(kind)
        letters = system.letters(address)
        service: Service[None] = Service("workers")

        async def handler(message: Message[str]) -> None:
            pass

        service.subscribe(address)(handler)

        async def all_refuse(broker: Any) -> None:
            async def browse() -> None:
                async for _ in broker.browse(address):
                    pass

            async def subscribe() -> None:
                async with broker.subscribe(address):
                    pass

            async def run() -> None:
                async with service.running(broker):
                    pass

            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: broker.publish(address, "v"),
                lambda: broker.publish_many(address, ["v"]),
                lambda: broker.redrive(letters),
                lambda: system.backlog(broker, address),
                lambda: broker.declare(address),
                lambda: broker.delete(address),
                lambda: broker.purge(letters),
                lambda: broker.health(),
                browse,
                subscribe,
                run,
            ]
            for call in calls:
                with pytest.raises(Closed):
                    await call()

        broker = system.connect()
        await all_refuse(broker)
        async with broker:
            pass
        await all_refuse(broker)

    async def test_other_settings_than_declared_are_a_mismatch(self, system: Harness, kind: Kind) -> None:
        """E1: with declare="check", at the start; the address stays as it is."""
        first, other = (
            (system.topic(), system.topic(partitions=9))
            if kind == "topic"
            else (system.queue(), system.queue(lease=system.lease + 7))
        )
        async with system.connect() as broker:
            await broker.declare(first)
            described = await system.driver(broker).describe(system.native(broker, first))
        setting = "partitions" if kind == "topic" else "lease"
        assert described is not None
        if setting in described:
            async with system.connect(declare="check") as broker:
                with pytest.raises(SettingsMismatch, match=setting):
                    await broker.publish(other, "v")
        for mode in ("auto", "never"):
            async with system.connect(declare=mode) as broker:
                await broker.publish(other, "v")
                assert await system.driver(broker).describe(system.native(broker, first)) == described

    async def test_only_what_may_help_to_try_again_is_retryable(self, system: Harness) -> None:
        """E2: the flag of each class of the tree."""
        found = {
            name
            for name, error in vars(errors).items()
            if isinstance(error, type) and issubclass(error, BrokerError) and error.retryable
        }
        assert found == RETRYABLE

    async def test_an_unreachable_system_is_unavailable_or_unknown(self, system: Harness, kind: Kind) -> None:
        """E1, E2: for every call, within its time, retryable; and it works again afterwards."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.declare(address)
            await system.disconnect(broker)

            async def subscribe() -> None:
                async with system.subscribe(broker, address):
                    pass

            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: broker.publish(address, "v", timeout=system.quiet),
                subscribe,
                lambda: system.backlog(broker, address),
                lambda: broker.declare(system.address(kind, "other")),
                lambda: broker.redrive(system.letters(address)),
                lambda: system.browse(broker, system.letters(address)),
            ]
            for call in calls:
                with pytest.raises((BrokerUnavailable, PublishUnknown)) as caught:
                    await call()
                assert caught.value.retryable
            await system.reconnect(broker)

            async def good() -> bool:
                return (await broker.health()).ok

            await system.eventually(good)
            await broker.publish(address, "v")

    async def test_an_error_is_wrapped_once(self, system: Harness, kind: Kind) -> None:
        """E3: the cause of a BrokerError is the client library's error, never another BrokerError."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.declare(address)
            await system.disconnect(broker)
            with pytest.raises(BrokerError) as caught:
                await broker.publish(address, "v", timeout=system.quiet)
            assert not isinstance(caught.value.__cause__, BrokerError)
            await system.reconnect(broker)

    async def test_health_and_backlog_are_truthful_while_the_system_is_down(self, system: Harness, kind: Kind) -> None:
        """E6: health says no, the backlog raises; neither makes something up."""
        address = system.address(kind)
        async with system.connect() as broker:
            async with system.subscribe(broker, address):
                await system.publish(broker, address, ["a", "b"])
            await system.disconnect(broker)
            assert not (await broker.health()).ok
            with pytest.raises(BrokerUnavailable):
                await system.backlog(broker, address)
            await system.reconnect(broker)

            async def good() -> bool:
                return (await broker.health()).ok

            await system.eventually(good)
            assert (await system.backlog(broker, address)).waiting in {None, 2}

    @needs("topic", "queue")
    async def test_an_option_of_the_other_kind_is_refused(self, system: Harness) -> None:
        """E1: delay on a topic, key on a queue, start on a queue: never ignored."""
        topic, queue = system.topic(), system.queue()
        async with system.connect() as broker:
            publish: Any = broker.publish
            wrong: list[tuple[Any, dict[str, Any]]] = [
                (topic, {"delay": 1}),
                (topic, {"delay": datetime.now(UTC)}),
                (topic, {"ttl": 1}),
                (topic, {"priority": 1}),
                (queue, {"key": "k"}),
                (queue, {"priority": 1}),
            ]
            for address, options in wrong:
                with pytest.raises(ConfigError):
                    await publish(address, "v", **options)
            subscribe: Any = broker.subscribe
            for options in ({"group": "g"}, {"start": Start.EARLIEST}, {"until_end": True}, {"on_invalid": "skip"}):
                with pytest.raises(ConfigError):
                    async with subscribe(queue, **options):
                        pass
            for address in (topic, queue):
                async with system.subscribe(broker, address) as messages:
                    await system.nothing(messages)

    async def test_nothing_is_published_to_dead_letters_and_nothing_subscribed(
        self, system: Harness, kind: Kind
    ) -> None:
        """E1: they are browsed and redriven."""
        letters: Any = system.letters(system.address(kind))
        async with system.connect() as broker:
            with pytest.raises(ConfigError, match="dead letters"):
                await broker.publish(letters, "v")
            with pytest.raises(ConfigError, match="dead letters"):
                async with broker.subscribe(letters):
                    pass
            with pytest.raises(ConfigError):
                await broker.redrive(system.address(kind))  # type: ignore[arg-type]
