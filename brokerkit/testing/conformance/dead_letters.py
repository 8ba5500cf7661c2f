"""DEAD LETTERS: what cannot be handled is kept once, as it was, with the reason; and can be brought back."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from ... import clock
from ...address import AnyQueue, AnyTopic
from ...broker import Broker
from ...driver import Record, Settlement
from ...errors import BrokerError, ConfigError, Reject, TooLarge
from ...message import Letter, Message
from ...policy import MAX_BODY, MAX_REASON, RetryPolicy
from ._harness import Harness, Kind
from ._raw import raw, raw_address, raw_target
from ._runner import Suite, needs, seeds


@dataclass
class Order:
    id: str
    total: float


class AsIs:
    """A codec that lets a test store any bytes under the content type of JSON."""

    content_type = "application/json"

    def encode(self, value: bytes, /) -> bytes:
        return value

    def decode(self, body: bytes, headers: object, /) -> bytes:
        return body


async def fail(message: Message[str]) -> None:
    raise RuntimeError(f"cannot handle {message.id}")


class DeadLetters(Suite):
    async def dead(
        self, system: Harness, broker: Broker, address: AnyTopic | AnyQueue, count: int, group: str = "workers"
    ) -> list[Letter[str]]:
        """Wait until there are *count* dead letters, and return them."""
        found: list[Letter[str]] = []

        async def enough() -> bool:
            found[:] = await system.browse(broker, system.letters(address, group))
            return len(found) >= count

        await system.eventually(enough, f"{count} dead letters")
        assert len(found) == count
        return found

    async def test_after_the_last_attempt_there_is_one_letter_with_everything(
        self, system: Harness, kind: Kind
    ) -> None:
        """Q1: id, body, key and headers as they were; reason, error, attempts, origin, group and times."""
        address = system.address(kind)
        headers = {"name": "text", "Name": "other case", "ünïcode": "grüße", "traceparent": "00-ab-cd-01"}
        async with system.connect() as broker:
            before = datetime.fromtimestamp(clock.current().time(), UTC)
            if kind == "topic":
                await broker.publish(system.topic(), "väl", id="id", headers=headers, key="key")
            else:
                await broker.publish(system.queue(), "väl", id="id", headers=headers)
            retry = RetryPolicy(attempts=3, wait_initial=system.quiet / 5, wait_jitter=0)
            async with system.serve(broker, address, fail, retry=retry):
                await self.dead(system, broker, address, 1)
                await system.settle_down()
            (letter,) = await self.dead(system, broker, address, 1)
            after = datetime.fromtimestamp(clock.current().time(), UTC)
            assert (letter.id, letter.value, letter.body) == ("id", "väl", "väl".encode())
            assert letter.headers == headers
            assert list(letter.headers) == list(headers)
            assert letter.key == ("key" if kind == "topic" else None)
            dead = letter.dead
            assert (dead.error, dead.attempts, dead.origin) == ("RuntimeError", 3, system.prefix + address.name)
            assert dead.group == (system.prefix + "workers" if kind == "topic" else None)
            assert "cannot handle id" in dead.text
            assert dead.reason
            assert before <= letter.timestamp <= dead.first_failed < dead.last_failed <= after
            backlog = await system.backlog(broker, address)
            assert (backlog.waiting, backlog.in_flight, backlog.dead) in {(0, 0, 1), (None, None, None)}

    async def test_rejecting_by_hand_keeps_the_reason(self, system: Harness, kind: Kind) -> None:
        """Q1: one letter, at once, and the message is gone."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["a"])
            (message,) = await system.take(messages, 1)
            await message.reject("the address is empty")
            (letter,) = await self.dead(system, broker, address, 1)
            assert letter.dead.reason == "the address is empty"
            await system.nothing(messages)

    async def test_what_cannot_be_stored_leaves_the_message_unsettled(self, system: Harness, kind: Kind) -> None:
        """Q2: a copy that is too large fails its own settlement only, which may then have another outcome."""
        address, out = raw_address(system, kind), raw_target(system)
        async with raw(system, address, out) as opened:
            await opened.put(address, ["a", "b", "c"])
            letters = address.dead_letters("workers") if kind == "topic" else address.dead_letters  # type: ignore[operator]
            async with opened.consume(address) as consumer:
                taken = await opened.take(consumer, 3)
                # Not a letter: what others have published may be larger, and has to be buried.
                large = Record(out, "large", b"x" * (MAX_BODY + 1))
                small = Record(letters, "small", b"x")  # type: ignore[arg-type]
                items = [Settlement(taken[0], (small,)), Settlement(taken[1], (large,)), Settlement(taken[2])]
                results = await consumer.settle(items, confirm=True)
                assert [type(result) for result in results] == [type(None), TooLarge, type(None)]
                await opened.nothing(consumer)
                await consumer.release([taken[1]])
                (again,) = await opened.take(consumer, 1)
                assert (again.record.id, again.deliveries) == (taken[1].record.id, 1)
                await opened.done(consumer, again, confirm=True)
            stored = await opened.driver.browse(letters, limit=10)  # type: ignore[arg-type]
            assert [item.record.id for item in stored] == ["small"]

    async def test_a_dead_letter_waits_for_the_connection(self, system: Harness, kind: Kind) -> None:
        """Q2: while it cannot be stored the message is not settled; in the end there is exactly one letter."""
        address = system.address(kind)
        failing, go = asyncio.Event(), asyncio.Event()

        async def handle(message: Message[str]) -> None:
            failing.set()
            await go.wait()
            raise Reject("no")

        async with system.connect() as broker, system.connect() as observer:
            await system.publish(broker, address, ["a"])
            async with system.serve(broker, address, handle):
                await failing.wait()
                await system.disconnect(broker)
                go.set()
                await system.settle_down()
                assert await system.browse(observer, system.letters(address)) == []
                await system.reconnect(broker)
                await self.dead(system, observer, address, 1)
                await asyncio.sleep(system.gone(kind))
            assert [letter.id for letter in await self.dead(system, observer, address, 1)] == ["a"]
            async with system.subscribe(observer, address) as messages:
                await system.nothing(messages)

    @seeds(2)
    async def test_a_crash_on_the_way_to_the_dead_letters_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """Q3: the letter is stored before the message is gone; both at once where settling is atomic."""
        claim = system.topics if kind == "topic" else system.queues
        addresses = [system.address(kind, f"{kind}{steps}") for steps in range(12)]
        async with system.connect() as broker:
            for steps, address in enumerate(addresses):
                doomed = system.connect()
                async with doomed:
                    await broker.publish(address, "value", id=f"v{steps}")
                    async with system.subscribe(doomed, address) as held:
                        (message,) = await system.take(held, 1)
                        task = asyncio.ensure_future(message.reject("dies"))
                        await system.moments(steps)
                        await system.crash(doomed)
                        await task
            await asyncio.sleep(system.gone(kind))
            again = [message for address in addresses for message in await system.rest(broker, address)]
            letters = [
                letter for address in addresses for letter in await system.browse(broker, system.letters(address))
            ]
        assert {item.id for item in (*again, *letters)} == {f"v{steps}" for steps in range(12)}
        assert (again and letters) or not system.virtual, "all died on the same side of storing the letter"
        if claim is not None and claim.atomic:
            assert len(again) + len(letters) == 12

    async def test_an_undecodable_message_is_kept_with_its_bytes(self, system: Harness, kind: Kind) -> None:
        """Q4: bad JSON, a wrong field, another content type: dead letters with the reason, and the consumer lives."""
        address = system.address(kind, "orders", Order)
        foreign = system.topic("orders", bytes) if kind == "topic" else system.queue("orders", bytes)
        as_json = (
            system.topic("orders", bytes, codec=AsIs())
            if kind == "topic"
            else system.queue("orders", bytes, codec=AsIs())
        )
        bad = {
            "json": b'{"id": "o1", "total',
            "field": b'{"id": "o1", "total": "much"}',
            "utf8": b'{"id": "\xff", "total": 1}',
        }
        handled: list[Order] = []

        async def handle(message: Message[Order]) -> None:
            handled.append(message.value)

        async with system.connect() as broker, system.connect() as raw_json, system.connect() as raw_bytes:
            for id, body in bad.items():
                await raw_json.publish(as_json, body, id=id)
            await raw_bytes.publish(foreign, b"\x00\xff", id="binary")
            await broker.publish(address, Order("o2", 2.5))
            async with system.serve(broker, address, handle, retry=RetryPolicy(attempts=3)):
                letters = {letter.id: letter for letter in await self.dead(system, broker, address, 4)}
                await system.eventually(lambda: handled)
                await broker.publish(address, Order("o3", 3.5))
                await system.eventually(lambda: len(handled) == 2)
        assert handled == [Order("o2", 2.5), Order("o3", 3.5)]
        for id, body in {**bad, "binary": b"\x00\xff"}.items():
            assert letters[id].body == body
            assert letters[id].dead.error == "DecodeError"
            assert letters[id].dead.reason
            with pytest.raises(BrokerError):
                assert letters[id].value
        assert "application/json" in letters["binary"].dead.reason + letters["binary"].dead.text

    async def test_an_undecodable_message_does_not_end_a_group_read_by_hand(self, system: Harness, kind: Kind) -> None:
        """Q4: the reader of a group or a queue only gets what it can read."""
        address = system.address(kind, "orders", Order)
        as_json = (
            system.topic("orders", bytes, codec=AsIs())
            if kind == "topic"
            else system.queue("orders", bytes, codec=AsIs())
        )
        async with system.connect() as broker, system.connect() as raw_json:
            await raw_json.publish(as_json, b"{", id="bad")
            await broker.publish(address, Order("o1", 1.0), id="good")
            async with system.subscribe(broker, address) as messages:
                assert [m.value for m in await system.drain(messages)] == [Order("o1", 1.0)]
            assert [letter.id for letter in await self.dead(system, broker, address, 1)] == ["bad"]

    async def test_a_redriven_message_starts_anew(self, system: Harness, kind: Kind) -> None:
        """Q5: attempt and deliveries are 1 again; id, body, headers are as they were; the letter is gone."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.publish(address, "value", id="id", headers={"name": "text"})
            for _ in range(2):
                (message,) = await system.take(messages, 1)
                await message.nack()
            (message,) = await system.take(messages, 1)
            await message.reject("no")
            (letter,) = await self.dead(system, broker, address, 1)
            report = await broker.redrive(system.letters(address))
            assert report.moved == 1
            (again,) = await system.take(messages, 1)
            assert (again.id, again.value, again.headers) == ("id", "value", {"name": "text"})
            assert (again.attempt, again.deliveries) == (1, 1)
            assert again.timestamp == letter.timestamp
            await again.ack(confirm=True)
            assert await system.browse(broker, system.letters(address)) == []
            await system.nothing(messages)

    @needs("queue.dedup")
    async def test_dedup_does_not_swallow_retries_and_redrives(self, system: Harness) -> None:
        """Q5: the window is asked for new messages only."""
        queue = system.queue(dedup=100 * system.lease)
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:
            await broker.publish(queue, "value", id="id")
            (message,) = await system.take(messages, 1)
            await message.nack()
            (message,) = await system.take(messages, 1)
            await message.reject("no")
            await self.dead(system, broker, queue, 1)
            await broker.redrive(queue.dead_letters)
            (message,) = await system.take(messages, 1)
            assert (message.id, message.attempt) == ("id", 1)
            await message.ack(confirm=True)
            assert (await broker.publish(queue, "value", id="id")).duplicate
            await system.nothing(messages)

    async def test_redriving_takes_what_it_is_told_to(self, system: Harness, kind: Kind) -> None:
        """Q5: where, limit and dry_run; what is left stays where it is."""
        address = system.address(kind)
        letters = system.letters(address)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, [f"v{n}" for n in range(10)])
            for message in await system.take(messages, 10):
                await message.reject("even" if int(message.value[1:]) % 2 == 0 else "odd")
            await self.dead(system, broker, address, 10)
            report = await broker.redrive(letters, dry_run=True)
            assert (report.seen, report.matched, report.moved) == (10, 10, 0)
            await system.nothing(messages)
            assert len(await system.browse(broker, letters)) == 10
            await broker.redrive(letters, where=lambda letter: letter.dead.reason == "even")
            assert sorted(m.value for m in await system.drain(messages)) == ["v0", "v2", "v4", "v6", "v8"]
            await broker.redrive(letters, limit=2)
            assert len(await system.drain(messages)) == 2
            assert len(await system.browse(broker, letters)) == 3

    @needs("queue")
    async def test_redriving_to_another_queue_moves_letters_there(self, system: Harness, kind: Kind) -> None:
        """Q5: `to=` chooses the queue; the address itself sees nothing."""
        address, other = system.address(kind), system.queue("other")
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["a"])
            (message,) = await system.take(messages, 1)
            await message.reject("no")
            await self.dead(system, broker, address, 1)
            await broker.redrive(system.letters(address), to=other)
            async with system.subscribe(broker, other) as others:
                assert [(m.value, m.attempt) for m in await system.drain(others)] == [("a", 1)]
            await system.nothing(messages)
            assert await system.browse(broker, system.letters(address)) == []

    async def test_redriven_messages_are_in_the_backlog(self, system: Harness, kind: Kind) -> None:
        """E6: they are left to do like any other, also those that a topic's group reads beside the topic."""
        address = system.address(kind)
        async with system.connect() as broker:
            async with system.subscribe(broker, address) as messages:
                await system.publish(broker, address, ["a", "b", "c"])
                for message in await system.take(messages, 3):
                    await message.reject("no")
                await self.dead(system, broker, address, 3)
            assert (await system.backlog(broker, address)).waiting in {0, None}
            await broker.redrive(system.letters(address), limit=2)
            found = await system.backlog(broker, address)
            assert (found.waiting, found.dead) in {(2, 1), (None, None)}
            assert found.waiting is None or found.oldest_age is not None
            async with system.subscribe(broker, address) as messages:
                for message in await system.take(messages, 2):
                    await message.ack(confirm=True)
                assert (await system.backlog(broker, address)).waiting in {0, None}

    async def test_redriving_ends_although_everything_fails_again(self, system: Harness, kind: Kind) -> None:
        """Q5: up to the end as it was when it began; each message runs once for each redrive."""
        address = system.address(kind)
        runs: Counter[str] = Counter()

        async def handle(message: Message[str]) -> None:
            runs[message.id] += 1
            raise Reject("always")

        async with system.connect() as broker, system.serve(broker, address, handle, concurrency=4):
            await system.publish(broker, address, [f"v{n}" for n in range(20)])
            await self.dead(system, broker, address, 20)
            report = await broker.redrive(system.letters(address))
            assert report.moved == 20
            await system.eventually(lambda: sum(runs.values()) == 40)
            await self.dead(system, broker, address, 20)
            await system.settle_down()
        assert runs == {f"v{n}": 2 for n in range(20)}

    @needs("topic")
    async def test_redriving_one_group_shows_the_others_nothing(self, system: Harness) -> None:
        """Q5: a topic is never written to by a redrive."""
        topic = system.topic()
        async with (
            system.connect() as broker,
            broker.subscribe(topic, group="one") as one,
            broker.subscribe(topic, group="two") as two,
            broker.subscribe(topic) as reader,
        ):
            await system.publish(broker, topic, ["a"])
            assert [m.value for m in await system.take(reader, 1)] == ["a"]
            for messages in (one, two):
                (message,) = await system.take(messages, 1)
                await message.reject("no")
            await self.dead(system, broker, topic, 1, "one")
            await self.dead(system, broker, topic, 1, "two")
            await broker.redrive(topic.dead_letters("one"))
            assert [m.value for m in await system.drain(one)] == ["a"]
            await system.nothing(two)
            await system.nothing(reader)
            assert [letter.id for letter in await system.browse(broker, topic.dead_letters("two"))] == ["a"]
            assert await system.browse(broker, topic.dead_letters("one")) == []

    async def test_a_letter_that_fails_again_is_one_plain_letter(self, system: Harness, kind: Kind) -> None:
        """Q6: no dead letters of dead letters, and no trace of the first death."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.publish(address, "value", id="id", headers={"name": "text"})
            for reason in ("first", "second", "third"):
                (message,) = await system.take(messages, 1)
                await message.reject(reason)
                (letter,) = await self.dead(system, broker, address, 1)
                assert (letter.dead.reason, letter.dead.origin) == (reason, system.prefix + address.name)
                assert (letter.body, letter.headers) == (b"value", {"name": "text"})
                await broker.redrive(system.letters(address))

    async def test_dead_letters_cannot_be_subscribed_to(self, system: Harness, kind: Kind) -> None:
        """Q6: they are browsed and redriven; reading them as a queue would need dead letters of its own."""
        letters = system.letters(system.address(kind))
        async with system.connect() as broker:
            with pytest.raises(ConfigError):
                async with broker.subscribe(letters):  # type: ignore[call-overload]
                    pass
            with pytest.raises(ConfigError):
                await broker.publish(letters, "value")  # type: ignore[call-overload]

    async def test_the_text_of_an_error_is_cut_and_its_secrets_are_masked(self, system: Harness, kind: Kind) -> None:
        """Q7: no password in a letter, and no megabyte of text."""
        address = system.address(kind)

        async def handle(message: Message[str]) -> None:
            if message.value == "long":
                raise RuntimeError("x" * 100_000)
            if message.value == "secret":
                raise RuntimeError("cannot reach redis://user:hunter2@host:6379/0 with password=hunter2")
            raise Reject("kafka://user:hunter2@host " + "y" * 100_000)

        async with (
            system.connect() as broker,
            system.serve(broker, address, handle, retry=RetryPolicy(attempts=1)),
        ):
            await system.publish(broker, address, ["long", "secret", "reject"])
            letters = {letter.value: letter for letter in await self.dead(system, broker, address, 3)}
        for letter in letters.values():
            assert "hunter2" not in letter.dead.reason + letter.dead.text
            assert len(letter.dead.reason) <= MAX_REASON
            assert len(letter.dead.text) <= MAX_REASON
        assert letters["long"].dead.text.startswith("x" * 100)
        assert "host:6379" in letters["secret"].dead.text

    async def test_dead_letters_outlive_what_they_came_from(self, system: Harness, kind: Kind) -> None:
        """Q8: neither the topic's retention nor the message's time to live counts for them."""
        async with system.connect() as broker:
            address: AnyTopic | AnyQueue
            if kind == "topic":
                address = system.topic(retention=max(1.0, system.lease))
                await broker.publish(address, "a", id="a")
            else:
                address = system.queue()
                claimed = system.queues is not None and system.queues.ttl
                await (
                    broker.publish(address, "a", id="a", ttl=2 * system.lease)
                    if claimed
                    else broker.publish(address, "a", id="a")
                )
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                await message.reject("no")
                await self.dead(system, broker, address, 1)
                await asyncio.sleep(4 * system.lease)
                await system.publish(broker, address, ["b"])
                assert [m.value for m in await system.drain(messages)] == ["b"]
                (letter,) = await self.dead(system, broker, address, 1)
                assert (letter.id, letter.value) == ("a", "a")
                await broker.redrive(system.letters(address))
                assert [m.value for m in await system.drain(messages)] == ["a"]

    async def test_looking_at_dead_letters_changes_nothing(self, system: Harness, kind: Kind) -> None:
        """Q1: browsing twice shows the same, in the order of dying."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            for number in range(5):
                await system.publish(broker, address, [f"v{number}"])
                (message,) = await system.take(messages, 1)
                await message.reject(f"reason {number}")
                await self.dead(system, broker, address, number + 1)
            shown = [[letter.dead.reason for letter in await self.dead(system, broker, address, 5)] for _ in range(2)]
        assert shown == [[f"reason {number}" for number in range(5)]] * 2
