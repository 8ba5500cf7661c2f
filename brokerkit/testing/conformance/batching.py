"""BATCH: many at once, in publishing and in handlers; each message keeps a fate of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ...errors import BrokerError, ConfigError, EncodeError, Reject, TooLarge
from ...events import DeadLettered, Retried
from ...message import Message
from ...policy import MAX_BODY, Batch, RetryPolicy
from ._harness import Harness, Kind
from ._raw import Raw
from ._runner import Suite, needs

Messages = Sequence[Message[str]]


class Batching(Suite):
    async def test_publish_many_gives_one_receipt_each_in_order(self, system: Harness, kind: Kind) -> None:
        """B1: as many as there were values, with ids of their own."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            receipts = await broker.publish_many(address, [f"v{n}" for n in range(250)])
            assert not [receipt for receipt in receipts if isinstance(receipt, BrokerError)]
            by_id = {m.id: m.value for m in await system.drain(messages)}
            assert [by_id[getattr(receipt, "id", "")] for receipt in receipts] == [f"v{n}" for n in range(250)]

    @needs("topic")
    async def test_publish_many_keeps_the_order_of_a_key(self, system: Harness) -> None:
        """B1: the messages of a key are stored in the order of the call, and of calls one after the other."""
        topic = system.topic()
        async with system.connect() as broker:
            for part in range(3):
                items = [topic.outgoing(f"{part}{n:02}", key=f"k{n % 5}") for n in range(50)]
                await broker.publish_many(topic, items)
            order: dict[str, list[str]] = {}
            async with broker.subscribe(topic, group="workers") as messages:
                for message in await system.drain(messages):
                    order.setdefault(message.key or "", []).append(message.value)
            assert len(order) == 5
            assert all(values == sorted(values) and len(values) == 30 for values in order.values())

    async def test_publish_many_reports_a_bad_item_at_its_index(self, system: Harness, kind: Kind) -> None:
        """B1: partial failure: the others are stored."""
        address = system.address(kind, type=bytes)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            bodies = [b"a", b"x" * (MAX_BODY + 1), b"b", "no bytes", b"c"]
            results = await broker.publish_many(address, bodies)
            kinds = [type(result) if isinstance(result, BrokerError) else None for result in results]
            assert kinds == [None, TooLarge, None, EncodeError, None]
            assert sorted(m.value for m in await system.drain(messages)) == [b"a", b"b", b"c"]

    @needs("topic")
    async def test_around_a_bad_item_the_order_of_its_key_holds(self, system: Harness) -> None:
        """B1: what can never be sent fails alone, and the others of its key stay in order."""
        topic = system.topic(type=bytes)
        async with system.connect() as broker, broker.subscribe(topic, group="workers") as messages:
            big = b"x" * (MAX_BODY + 1)
            items = [topic.outgoing(body, key="k") for body in (b"1", big, b"2", big, b"3")]
            results = await broker.publish_many(topic, items)
            kinds = [type(result) if isinstance(result, BrokerError) else None for result in results]
            assert kinds == [None, TooLarge, None, TooLarge, None]
            assert [m.value for m in await system.drain(messages)] == [b"1", b"2", b"3"]

    async def test_an_item_of_another_address_fails_alone(self, system: Harness, kind: Kind) -> None:
        """B1: publish_many is for one address; what was made for another is not sent anywhere."""
        address, other = system.address(kind), system.address(kind, "other")
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.declare(other)
            items: list[Any] = [address.outgoing("a"), other.outgoing("b"), address.outgoing("c")]
            results = await broker.publish_many(address, items)
            kinds = [type(result) if isinstance(result, BrokerError) else None for result in results]
            assert kinds == [None, ConfigError, None]
            assert sorted(m.value for m in await system.drain(messages)) == ["a", "c"]
            async with system.subscribe(broker, other) as others:
                await system.nothing(others)

    async def test_publishing_many_of_nothing_is_nothing(self, system: Harness, kind: Kind) -> None:
        """B5: an empty batch."""
        address = system.address(kind)
        async with system.connect() as broker:
            assert await broker.publish_many(address, []) == []

    async def test_a_batch_handler_gets_at_most_its_maximum(self, system: Harness, kind: Kind) -> None:
        """B2: full batches when there is enough; everything exactly once; never an empty one (B5)."""
        address = system.address(kind)
        sizes: list[int] = []
        handled: list[str] = []

        async def handler(messages: Messages) -> None:
            sizes.append(len(messages))
            handled.extend(m.id for m in messages)

        async with system.connect() as broker:
            await broker.publish_many(address, [f"v{n}" for n in range(23)])
            async with system.serve(broker, address, handler, batch=Batch(5, wait=system.quiet)):
                await system.eventually(lambda: len(handled) == 23)
                await system.settle_down()
            assert max(sizes) == 5
            assert min(sizes) >= 1
            assert len(set(handled)) == len(handled) == 23
            async with system.subscribe(broker, address) as rest:
                await system.nothing(rest)

    async def test_an_unfinished_batch_waits_no_longer_than_it_may(self, system: Harness, kind: Kind) -> None:
        """B2: what is there after *wait* seconds is handled, and what comes within them is in it."""
        address = system.address(kind)
        batches: list[list[str]] = []
        times: list[float] = []

        async def handler(messages: Messages) -> None:
            batches.append([m.id for m in messages])
            times.append(system.now())

        async with system.connect() as broker:
            async with system.serve(broker, address, handler, batch=Batch(100, wait=system.quiet)):
                began = system.now()
                await system.publish(broker, address, ["a"])
                await asyncio.sleep(system.quiet / 2)
                await system.publish(broker, address, ["b"])
                await system.eventually(lambda: batches)
            assert batches == [["a", "b"]]
            assert times[0] - began < 2 * system.quiet + system.deadline / 10

    async def test_a_batch_handler_that_returns_acknowledges_all(self, system: Harness, kind: Kind) -> None:
        """B3: nothing comes again."""
        address = system.address(kind)

        async def handler(messages: Messages) -> None:
            handled.extend(messages)

        handled: list[Message[str]] = []
        async with system.connect() as broker:
            await broker.publish_many(address, [f"v{n}" for n in range(6)])
            async with system.serve(broker, address, handler, batch=Batch(3, wait=system.quiet)):
                await system.eventually(lambda: len(handled) == 6)
            async with system.subscribe(broker, address) as rest:
                await system.nothing(rest)

    async def test_a_message_of_a_batch_settled_by_hand_keeps_its_outcome(self, system: Harness, kind: Kind) -> None:
        """B3: rejected and nacked ones go their way, the others are acknowledged by the return."""
        address = system.address(kind)
        runs: list[tuple[str, int]] = []

        async def handler(messages: Messages) -> None:
            for message in messages:
                runs.append((message.value, message.attempt))
                if message.value == "reject":
                    await message.reject("no good")
                elif message.value == "nack" and message.attempt == 1:
                    await message.nack()

        async with system.connect() as broker:
            await system.publish(broker, address, ["ack", "reject", "nack"])
            async with system.serve(broker, address, handler, batch=Batch(3, wait=system.quiet)):
                await system.eventually(lambda: ("nack", 2) in runs)
                await system.settle_down()
            assert sorted(runs) == [("ack", 1), ("nack", 1), ("nack", 2), ("reject", 1)]
            (letter,) = await system.browse(broker, system.letters(address))
            assert (letter.value, letter.dead.reason) == ("reject", "no good")

    async def test_what_was_acknowledged_before_the_batch_failed_stays_so(self, system: Harness, kind: Kind) -> None:
        """B3: an exception concerns only what is unsettled."""
        address = system.address(kind)
        runs: list[str] = []

        async def handler(messages: Messages) -> None:
            runs.extend(m.value for m in messages)
            for message in messages:
                if message.value == "done":
                    await message.ack()
            if len(messages) > 1:
                raise LookupError

        async with system.connect() as broker:
            await system.publish(broker, address, ["done", "again"])
            async with system.serve(broker, address, handler, batch=Batch(2, wait=system.quiet)):
                await system.eventually(lambda: runs.count("again") == 2)
                await system.settle_down()
            assert runs.count("done") == 1

    async def test_a_poisonous_row_costs_only_itself(self, system: Harness, kind: Kind) -> None:
        """B4: an exception retries each message singly; singling out counts as no attempt."""
        address = system.address(kind)
        calls: list[list[str]] = []
        attempts: list[int] = []

        async def handler(messages: Messages) -> None:
            calls.append([m.value for m in messages])
            if any(m.value == "v3" for m in messages):
                if len(messages) == 1:
                    attempts.append(messages[0].attempt)
                raise LookupError("bad row")

        policy = RetryPolicy(attempts=3, wait_initial=0.01)
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(10)])
            options: dict[str, Any] = {"batch": Batch(10, wait=system.quiet), "retry": policy}
            async with system.serve(broker, address, handler, **options):
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.settle_down()
            assert attempts == [1, 2, 3]
            done = [value for call in calls if "v3" not in call for value in call]
            assert sorted(done) == sorted(f"v{n}" for n in range(10) if n != 3)
            (letter,) = await system.browse(broker, system.letters(address))
            assert (letter.value, letter.dead.attempts, letter.dead.error) == ("v3", 3, "LookupError")
            assert {event.id for event in system.seen(Retried)} == {"v3"}
            async with system.subscribe(broker, address) as rest:
                await system.nothing(rest)

    async def test_a_reject_from_a_batch_handler_concerns_the_guilty_message(self, system: Harness, kind: Kind) -> None:
        """B4: what is raised for a batch runs each message singly; raised for one it is that one's outcome."""
        address = system.address(kind)

        async def handler(messages: Messages) -> None:
            if any(m.value == "bad" for m in messages):
                raise Reject("bad")

        async with system.connect() as broker:
            await system.publish(broker, address, ["good1", "bad", "good2"])
            async with system.serve(broker, address, handler, batch=Batch(3, wait=system.quiet)):
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.settle_down()
            assert [letter.value for letter in await system.browse(broker, system.letters(address))] == ["bad"]

    async def test_what_cannot_be_read_is_no_part_of_a_batch(self, system: Harness, kind: Kind) -> None:
        """B4: it is dead-lettered with its bytes; the others are handled together, and no batch is empty."""
        address = system.address(kind, type=int)
        batches: list[list[int]] = []

        async def handler(messages: Sequence[Message[int]]) -> None:
            batches.append([m.value for m in messages])

        async with system.connect() as broker:
            await broker.declare(address)
            raw = Raw(system, broker)
            for number, body in enumerate((b"1", b"bad", b"2", b"worse")):
                await raw.publish([raw.record(system.native(broker, address), f"m{number}", body)])
            async with system.serve(broker, address, handler, batch=Batch(4, wait=system.quiet)):
                await system.eventually(lambda: len(system.seen(DeadLettered)) == 2)
                await system.eventually(lambda: sum(map(len, batches)) == 2)
                await system.settle_down()
            letters = await system.browse(broker, system.letters(address))
            assert sorted(letter.body for letter in letters) == [b"bad", b"worse"]
            assert sorted(value for batch in batches for value in batch) == [1, 2]
            assert [] not in batches
            async with system.subscribe(broker, address) as rest:
                await system.nothing(rest)

    @needs("topic")
    async def test_the_order_of_a_key_holds_in_batches(self, system: Harness) -> None:
        """B4: within a batch, from one to the next, and when one of them fails."""
        topic = system.topic()
        order: dict[str, list[str]] = {}
        failed: set[str] = set()

        async def handler(messages: Messages) -> None:
            await asyncio.sleep(0.001)
            if len(messages) > 1 and "k1-03" in {m.value for m in messages} and not failed:
                failed.add("k1-03")
                raise LookupError
            for message in messages:
                order.setdefault(message.key or "", []).append(message.value)

        async with system.connect() as broker:
            items = [topic.outgoing(f"k{k}-{n:02}", key=f"k{k}") for n in range(20) for k in range(4)]
            await broker.publish_many(topic, items)
            options: dict[str, Any] = {"batch": Batch(8, wait=0.05), "concurrency": 3}
            async with system.serve(broker, topic, handler, **options):
                await system.eventually(lambda: sum(map(len, order.values())) == 80)
        for key in ("k0", "k1", "k2", "k3"):
            assert order[key] == [f"{key}-{n:02}" for n in range(20)]

    async def test_one_failing_batch_does_not_hold_up_the_others(self, system: Harness, kind: Kind) -> None:
        """B4: while it waits for its retries, the others are handled."""
        address = system.address(kind)
        done: list[str] = []

        async def handler(messages: Messages) -> None:
            if any(m.value == "bad" for m in messages):
                raise LookupError
            done.extend(m.value for m in messages)

        policy = RetryPolicy(attempts=2, wait_initial=4 * system.quiet, wait_jitter=0)
        async with system.connect() as broker:
            await system.publish(broker, address, ["bad"], key=None)
            await system.publish(broker, address, [f"v{n}" for n in range(20)])
            options: dict[str, Any] = {"batch": Batch(4, wait=0.01), "retry": policy}
            async with system.serve(broker, address, handler, **options):
                began = system.now()
                await system.eventually(lambda: len(done) == 20)
                assert system.now() - began < 4 * system.quiet
                await system.eventually(lambda: system.seen(DeadLettered))

    @needs("topic")
    async def test_a_row_nacked_by_hand_comes_again_before_the_later_ones_of_its_key(self, system: Harness) -> None:
        """B3, B4: the batch fails, its rows run singly, and the key's order holds for the nacked one too."""
        topic = system.topic()
        runs: list[str] = []

        async def handler(messages: Messages) -> None:
            if len(messages) == 3:
                await messages[0].nack(delay=0.2)
                raise LookupError
            runs.extend(m.value for m in messages)

        async with system.connect() as broker:
            await broker.publish_many(topic, [topic.outgoing(f"v{n}", key="k") for n in range(3)])
            async with system.serve(broker, topic, handler, batch=Batch(3, wait=system.quiet), concurrency=3):
                await system.eventually(lambda: len(runs) == 3)
            assert runs == ["v0", "v1", "v2"]

    async def test_a_batch_that_is_being_gathered_when_the_service_stops_is_finished(
        self, system: Harness, kind: Kind
    ) -> None:
        """It waits for no more, runs and is acknowledged; it is not cancelled."""
        address = system.address(kind)
        ends: list[str] = []

        async def handler(messages: Messages) -> None:
            try:
                await asyncio.sleep(system.quiet)
                ends.append(f"{len(messages)} done")
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        async with system.connect() as broker:
            batch = Batch(10, wait=3600)
            async with system.serve(broker, address, handler, batch=batch, drain=system.deadline):
                await system.publish(broker, address, ["a", "b", "c"])
                await asyncio.sleep(system.quiet)
            assert ends == ["3 done"]
            async with system.subscribe(broker, address) as rest:
                await system.nothing(rest)

    @needs("topic")
    async def test_a_batch_that_fails_while_the_service_stops_is_handed_back(self, system: Harness) -> None:
        """All of it, several of one key too: another member handles them."""
        topic = system.topic()
        began = asyncio.Event()

        async def handler(messages: Messages) -> None:
            began.set()
            await asyncio.sleep(system.quiet)
            raise LookupError

        async with system.connect() as broker:
            items = [topic.outgoing(f"v{n}", key="k") for n in range(3)]
            await broker.publish_many(topic, items)
            async with system.serve(broker, topic, handler, batch=Batch(3, wait=system.quiet)):
                await began.wait()
            async with broker.subscribe(topic, group="workers") as messages:
                assert [m.value for m in await system.drain(messages)] == ["v0", "v1", "v2"]
