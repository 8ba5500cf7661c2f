"""STAGING: `message.publish` goes out with the message's acknowledgement, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from ...address import AnyQueue, AnyTopic, Queue, Topic
from ...broker import Broker
from ...errors import AlreadySettled, ConfigError, EncodeError, InvalidName, Nack, NotFound, Reject, TooLarge
from ...events import DeadLettered
from ...message import Message
from ...policy import MAX_BODY, Batch, RetryPolicy
from ._harness import Harness, Kind
from ._runner import Suite, needs


async def stored(system: Harness, broker: Broker, address: AnyTopic | AnyQueue) -> list[str]:
    """Return the values in *address*, acknowledging them."""
    async with system.subscribe(broker, address) as messages:
        return sorted(m.value for m in await system.drain(messages))


class Staging(Suite):
    async def test_what_a_handler_publishes_goes_out_with_its_acknowledgement(
        self, system: Harness, kind: Kind
    ) -> None:
        """Not before the handler returns; several, to several addresses, with all options."""
        address, out, log = system.address(kind), system.target(), system.topic("log")
        inside, go = asyncio.Event(), asyncio.Event()

        async def handler(message: Message[str]) -> None:
            await message.publish(out, "one", id="id-one", headers={"a": "b"})
            await message.publish(log, "two", key="k")
            inside.set()
            await go.wait()

        async with system.connect() as broker, system.subscribe(broker, out) as outs:
            async with system.serve(broker, address, handler):
                await system.publish(broker, address, ["v"])
                await inside.wait()
                await system.nothing(outs)
                go.set()
                (message,) = await system.take(outs, 1)
                assert (message.id, message.value, message.headers) == ("id-one", "one", {"a": "b"})
                await message.ack()
            async with broker.subscribe(log, group="readers") as logs:
                (entry,) = await system.take(logs, 1)
                assert (entry.value, entry.key) == ("two", "k")

    async def test_nothing_goes_out_when_the_attempt_fails(self, system: Harness, kind: Kind) -> None:
        """Retry, Nack, Reject, timeout: dropped; only what the successful run staged is stored, once."""
        address, out = system.address(kind), system.target()
        ends: dict[str, Callable[[Message[str]], BaseException | None]] = {
            "raises": lambda m: LookupError() if m.attempt == 1 else None,
            "nacks": lambda m: Nack() if m.attempt == 1 else None,
            "rejects": lambda m: Reject("no"),
            "succeeds": lambda m: None,
        }

        async def handler(message: Message[str]) -> None:
            await message.publish(out, f"{message.value}{message.attempt}")
            error = ends[message.value](message)
            if error is not None:
                raise error

        policy = RetryPolicy(attempts=3, wait_initial=0.01)
        async with system.connect() as broker:
            async with system.serve(broker, address, handler, retry=policy):
                await system.publish(broker, address, list(ends))
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.settle_down()
            assert await stored(system, broker, out) == ["nacks2", "raises2", "succeeds1"]

    async def test_nothing_goes_out_when_the_message_is_handed_back(self, system: Harness, kind: Kind) -> None:
        """A drain that cancels the handler drops what it had staged; the next run publishes it."""
        address, out = system.address(kind), system.target()
        runs: list[int] = []

        async def handler(message: Message[str]) -> None:
            runs.append(message.attempt)
            await message.publish(out, f"run{len(runs)}")
            if len(runs) == 1:
                await asyncio.sleep(system.deadline)

        async with system.connect() as broker:
            await broker.declare(out)
            await system.publish(broker, address, ["v"])
            async with system.serve(broker, address, handler, drain=0):
                await system.eventually(lambda: runs)
            async with system.serve(broker, address, handler):
                await system.eventually(lambda: len(runs) == 2)
            assert await stored(system, broker, out) == ["run2"]
        assert runs == [1, 1]

    async def test_staging_by_hand_follows_the_outcome(self, system: Harness, kind: Kind) -> None:
        """ack stores, ack(confirm=True) has stored when it returns; nack and reject drop."""
        address, out = system.address(kind), system.target()
        async with system.connect() as broker:
            await broker.declare(out)
            async with system.subscribe(broker, address) as messages:
                await system.publish(broker, address, ["ack", "confirm", "nack", "reject"])
                for message in await system.take(messages, 4):
                    await message.publish(out, message.value)
                    assert [item.value for item in message.published] == [message.value]
                    match message.value:
                        case "ack":
                            await message.ack()
                        case "confirm":
                            await message.ack(confirm=True)
                        case "nack":
                            await message.nack()
                        case _:
                            await message.reject("no")
                (again,) = await system.take(messages, 1)
                assert again.value == "nack"
                await again.ack()
            assert await stored(system, broker, out) == ["ack", "confirm"]

    async def test_publishing_after_settling_is_already_settled(self, system: Harness, kind: Kind) -> None:
        """There is no acknowledgement left to go with."""
        address, out = system.address(kind), system.target()
        settles: list[Callable[[Message[Any]], Awaitable[None]]] = [
            lambda m: m.ack(),
            lambda m: m.nack(delay=1),
            lambda m: m.reject("no"),
        ]
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.declare(out)
            for number, settle in enumerate(settles):
                await system.publish(broker, address, [f"v{number}"])
                (message,) = await system.take(messages, 1)
                await settle(message)
                with pytest.raises(AlreadySettled):
                    await message.publish(out, "late")
                if number == 1:
                    (again,) = await system.take(messages, 1)
                    await again.ack()
            assert await stored(system, broker, out) == []

    async def test_what_cannot_be_published_is_refused_at_once(self, system: Harness, kind: Kind) -> None:
        """Validated in the handler, where it can be seen; the message is still to be settled."""
        address, out, topic = system.address(kind), system.target(), system.topic("log")
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["v"])
            (message,) = await system.take(messages, 1)
            publish: Any = message.publish
            wrong: list[tuple[type[Exception], Any, Any, dict[str, Any]]] = [
                (EncodeError, out, 5, {}),
                (TooLarge, out, "x" * (MAX_BODY + 1), {}),
                *([] if isinstance(out, Topic) else [(ConfigError, out, "v", {"key": "k"})]),
                (ConfigError, topic, "v", {"delay": 1}),
                (ConfigError, out, "v", {"headers": {"bk-x": "v"}}),
                (ConfigError, out, "v", {"priority": 3}),
                (ConfigError, out, "v", {"delay": -1}),
                (ConfigError, system.letters(out), "v", {}),
                (ConfigError, "out", "v", {}),
                (TypeError, out, "v", {"timeout": 1}),
            ]
            for error, where, value, options in wrong:
                with pytest.raises(error):
                    await publish(where, value, **options)
            await message.publish(out, "right")
            await message.ack()
            await system.nothing(messages)
            assert await stored(system, broker, out) == ["right"]
        with pytest.raises(InvalidName):
            system.target("a b")

    async def test_staging_to_a_missing_address_is_not_found(self, system: Harness, kind: Kind) -> None:
        """At once, with declare="check"; with "never" it fails the message, whose letter says why."""
        address, missing = system.address(kind), system.target("missing")
        async with system.connect() as broker:
            await broker.declare(address)
        async with system.connect(declare="check") as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["v"])
            (message,) = await system.take(messages, 1)
            with pytest.raises(NotFound, match="missing"):
                await message.publish(missing, "v")
            await message.ack()
        async with system.connect(declare="never") as broker:

            async def handler(message: Message[str]) -> None:
                await message.publish(missing, "v")

            async with system.serve(broker, address, handler, retry=RetryPolicy(attempts=1)):
                await system.publish(broker, address, ["never"])
                await system.eventually(lambda: system.seen(DeadLettered))
            (letter,) = await system.browse(broker, system.letters(address))
            assert letter.value == "never"
            assert letter.dead.error == "NotFound"

    async def test_what_is_staged_for_an_address_that_has_vanished_is_stored(self, system: Harness, kind: Kind) -> None:
        """With declare="auto" the address is created anew; the message is no dead letter."""
        # Where settling is not atomic the answer to the first attempt may be lost with the address: then it is stored again.
        address, out = system.address(kind), system.target()
        inside, go = asyncio.Event(), asyncio.Event()

        async def handler(message: Message[str]) -> None:
            await message.publish(out, message.value)
            inside.set()
            await go.wait()

        async with system.connect() as broker, system.connect() as admin, system.serve(broker, address, handler):
            await system.publish(admin, address, ["value"])
            await inside.wait()
            await admin.delete(out)
            go.set()
            values = await stored(system, admin, out)
            claim = system.queues if kind == "queue" else system.topics
            most = 1 if claim is not None and claim.atomic else 2
            assert set(values) == {"value"}
            assert len(values) <= most
            assert not system.seen(DeadLettered)

    @needs("queue.delay", "queue.priority")
    async def test_delay_and_priority_of_what_is_staged_count_from_the_acknowledgement(self, system: Harness) -> None:
        """The delay begins when it is stored, not when it was staged."""
        queue, out = system.queue(), system.queue("out")
        async with system.connect() as broker, broker.subscribe(queue) as messages, broker.subscribe(out) as outs:
            await system.publish(broker, queue, ["v"])
            (message,) = await system.take(messages, 1)
            await message.publish(out, "later", delay=2 * system.quiet)
            await asyncio.sleep(2 * system.quiet)
            await message.ack()
            began = system.now()
            (later,) = await system.take(outs, 1)
            assert system.now() - began >= 2 * system.quiet
            await later.ack()

    async def test_each_message_of_a_batch_stages_for_itself(self, system: Harness, kind: Kind) -> None:
        """What a rejected one staged is dropped, what the others staged is stored."""
        address, out = system.address(kind), system.target()

        async def handler(messages: Any) -> None:
            for message in messages:
                await message.publish(out, f"out {message.value}")
                if message.value == "bad":
                    await message.reject("no")

        async with system.connect() as broker:
            await system.publish(broker, address, ["a", "bad", "b"])
            async with system.serve(broker, address, handler, batch=Batch(3, wait=system.quiet)):
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.settle_down()
            assert await stored(system, broker, out) == ["out a", "out b"]

    async def test_a_lost_message_publishes_nothing(self, system: Harness, kind: Kind) -> None:
        """Ownership is made sure of first: the new owner's run publishes, the zombie's does not."""
        address, out = system.address(kind), system.target()
        zombie = system.connect()
        async with system.connect() as broker:
            await broker.declare(out)
            async with zombie, system.subscribe(zombie, address) as held:
                await system.publish(broker, address, ["v"])
                (stale,) = await system.take(held, 1)
                await stale.publish(out, "zombie")
                await system.freeze(zombie)
                async with system.subscribe(broker, address) as messages:
                    (fresh,) = await system.take(messages, 1)
                    await fresh.publish(out, "owner")
                    await fresh.ack(confirm=True)
                await system.thaw(zombie)
                await stale.ack()
            assert await stored(system, broker, out) == ["owner"]

    @needs("queue")
    async def test_a_reply_and_what_is_staged_go_out_together(self, system: Harness, kind: Kind) -> None:
        """The asker has its answer when the rest is stored."""
        quotes = Queue("quotes", str, reply=str, lease=system.lease)
        out = system.address(kind, "out")

        async def handler(message: Message[str]) -> str:
            await message.publish(out, "event")
            return "answer"

        async with (
            system.connect() as broker,
            system.subscribe(broker, out) as outs,
            system.serve(broker, quotes, handler),
        ):
            assert await broker.request(quotes, "q", timeout=system.deadline) == "answer"
            (event,) = await system.take(outs, 1)
            assert event.value == "event"
            await event.ack()

    async def test_what_a_failed_batch_has_staged_is_dropped(self, system: Harness, kind: Kind) -> None:
        """Its messages run one by one then, and each stages its own again: once."""
        address, out = system.address(kind), system.target()

        async def handler(messages: Sequence[Message[str]]) -> None:
            for message in messages:
                await message.publish(out, message.value)
            if any(message.value == "bad" for message in messages):
                raise LookupError

        async with system.connect() as broker:
            await system.publish(broker, address, ["a", "bad", "b"])
            batch, once = Batch(3, wait=system.quiet), RetryPolicy(attempts=1)
            async with system.serve(broker, address, handler, batch=batch, retry=once):
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.settle_down()
            assert await stored(system, broker, out) == ["a", "b"]
