"""DEDUP: an id identifies; it drops a second message only where the queue asks for it."""

from __future__ import annotations

import asyncio

from ...errors import Reject
from ...events import Retried
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness, Kind
from ._runner import Suite, needs


class Deduplicating(Suite):
    @needs("queue.dedup")
    async def test_a_second_message_of_an_id_is_dropped_and_its_receipt_says_so(self, system: Harness) -> None:
        """U1: one delivery; the receipt of the second is a duplicate, also after the first was acknowledged."""
        queue = system.queue(dedup=system.deadline)
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            receipts = [await broker.publish(queue, f"v{n}", id="same") for n in range(3)]
            assert [receipt.duplicate for receipt in receipts] == [False, True, True]
            assert {receipt.id for receipt in receipts} == {"same"}
            (message,) = await system.take(messages, 1)
            assert message.value == "v0"
            await message.ack(confirm=True)
            assert (await broker.publish(queue, "v3", id="same")).duplicate
            await system.nothing(messages)

    @needs("queue.dedup")
    async def test_different_ids_are_different_messages(self, system: Harness) -> None:
        """U1: the window knows ids, not values; an id that was made up is new."""
        queue = system.queue(dedup=system.deadline)
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            for id in ("a", "b", None, None):
                assert not (await broker.publish(queue, "value", id=id)).duplicate
            assert len(await system.drain(messages)) == 4

    @needs("queue.dedup")
    async def test_after_its_window_an_id_is_new(self, system: Harness) -> None:
        """U2: the window begins with the first message and is not prolonged by what it drops."""
        queue = system.queue(dedup=2 * system.quiet)
        async with system.connect() as broker:
            assert not (await broker.publish(queue, "first", id="m")).duplicate
            await asyncio.sleep(1.2 * system.quiet)
            assert (await broker.publish(queue, "second", id="m")).duplicate
            await asyncio.sleep(1.2 * system.quiet)
            assert not (await broker.publish(queue, "third", id="m")).duplicate
            async with broker.subscribe(queue) as messages:
                assert [m.value for m in await system.drain(messages)] == ["first", "third"]

    @needs("queue.dedup")
    async def test_of_many_at_once_one_is_stored(self, system: Harness) -> None:
        """U3: twenty publishers in two processes, one id."""
        queue = system.queue(dedup=system.deadline)
        async with system.connect() as one, system.connect() as two:
            receipts = await asyncio.gather(*((one, two)[n % 2].publish(queue, f"v{n}", id="m") for n in range(20)))
            assert [receipt.duplicate for receipt in receipts].count(False) == 1
            async with one.subscribe(queue) as messages:
                (message,) = await system.drain(messages)
            assert not receipts[int(message.value[1:])].duplicate, "the one that is stored is the one that was told so"

    @needs("queue.dedup")
    async def test_an_id_twice_in_one_call_is_stored_once(self, system: Harness) -> None:
        """U1: publish_many gives each its own receipt."""
        queue = system.queue(dedup=system.deadline)
        async with system.connect() as broker:
            items = [queue.outgoing("v", id=id) for id in ("a", "b", "a")]
            receipts = await broker.publish_many(queue, items)
            assert [getattr(receipt, "duplicate", receipt) for receipt in receipts] == [False, False, True]
            async with broker.subscribe(queue) as messages:
                assert sorted(m.id for m in await system.drain(messages)) == ["a", "b"]

    @needs("queue.dedup")
    async def test_queues_have_windows_of_their_own(self, system: Harness) -> None:
        """U5: one id on two queues is two messages."""
        one, two = system.queue("one", dedup=system.deadline), system.queue("two", dedup=system.deadline)
        async with system.connect() as broker:
            assert not (await broker.publish(one, "v", id="m")).duplicate
            assert not (await broker.publish(two, "v", id="m")).duplicate
            async with broker.subscribe(two) as messages:
                assert len(await system.drain(messages)) == 1

    @needs("queue.dedup")
    async def test_a_retry_is_not_swallowed_by_the_window(self, system: Harness) -> None:
        """U6: the copy has the id that the window knows, and runs all the same."""
        queue = system.queue(dedup=system.deadline)
        attempts: list[int] = []

        async def handler(message: Message[str]) -> None:
            attempts.append(message.attempt)
            if message.attempt < 3:
                raise LookupError

        policy = RetryPolicy(attempts=3, wait_initial=system.quiet / 2)
        async with system.connect() as broker, system.serve(broker, queue, handler, retry=policy):
            await broker.publish(queue, "v", id="m")
            await system.eventually(lambda: len(attempts) == 3)
            assert (await broker.publish(queue, "v", id="m")).duplicate
            await system.settle_down()
        assert attempts == [1, 2, 3]
        assert len(system.seen(Retried)) == 2

    @needs("queue.dedup", "queue.delay")
    async def test_a_delayed_message_is_known_to_the_window_while_it_waits(self, system: Harness) -> None:
        """U6: delay bypasses nothing: the second one is dropped, and the first comes when it is due."""
        queue = system.queue(dedup=system.deadline)
        async with system.connect() as broker, broker.subscribe(queue) as messages:
            await broker.publish(queue, "late", id="m", delay=2 * system.quiet)
            assert (await broker.publish(queue, "now", id="m")).duplicate
            (message,) = await system.take(messages, 1)
            assert message.value == "late"

    @needs("queue.dedup")
    async def test_a_dead_letter_and_its_redrive_are_not_swallowed_by_the_window(self, system: Harness) -> None:
        """U6: what died inside of its window comes back inside of it."""
        queue = system.queue(dedup=system.deadline)
        seen: list[int] = []

        async def handler(message: Message[str]) -> None:
            seen.append(message.attempt)
            if len(seen) == 1:
                raise Reject("not now")

        async with system.connect() as broker, system.serve(broker, queue, handler):
            await broker.publish(queue, "v", id="m")
            await system.eventually(lambda: len(seen) == 1)
            letters: list[object] = []

            async def dead() -> bool:
                letters[:] = await system.browse(broker, queue.dead_letters)
                return bool(letters)

            await system.eventually(dead)
            await broker.redrive(queue.dead_letters)
            await system.eventually(lambda: len(seen) == 2)
        assert seen == [1, 1]

    async def test_without_a_window_an_id_drops_nothing(self, system: Harness, kind: Kind) -> None:
        """U1: id identifies, it never deduplicates; the three are settled each for itself."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            receipts = [await broker.publish(address, f"v{n}", id="same") for n in range(3)]
            assert not any(receipt.duplicate for receipt in receipts)
            taken = await system.take(messages, 3)
            assert sorted(m.value for m in taken) == ["v0", "v1", "v2"]
            await taken[0].ack()
            await taken[1].nack()
            (again,) = await system.take(messages, 1)
            assert (again.value, again.attempt) == (taken[1].value, 2)
            await again.ack()
            await taken[2].ack()
            await system.nothing(messages)
