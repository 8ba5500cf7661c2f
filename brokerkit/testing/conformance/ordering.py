"""ORDER: per key on topics, with one consumer and with many, through retries, crashes and reconnects."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine

from ...address import Topic
from ...broker import Broker
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness
from ._runner import Suite, needs, restarts

KEYS = [f"k{n}" for n in range(8)]


class Trace:
    """What handlers saw: values are ``key/number``."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.running: Counter[str] = Counter()
        self.overlaps: list[str] = []
        self.count = 0

    def note(self, value: str) -> None:
        key, _, number = value.partition("/")
        self.seen[key].append(int(number))
        self.count += 1

    def handler(self) -> Callable[[Message[str]], Coroutine[None, None, None]]:
        """Return a handler that gives others their turn, and notes two runs of one key at a time."""

        async def handle(message: Message[str]) -> None:
            key, _, number = message.value.partition("/")
            self.running[key] += 1
            if self.running[key] > 1:
                self.overlaps.append(message.value)
            for _ in range(int(number) % 4):
                await asyncio.sleep(0)
            self.note(message.value)
            self.running[key] -= 1

        return handle

    def exact(self, count: int) -> None:
        """Fail unless each key came once, completely and in order."""
        assert dict(self.seen) == {key: list(range(count)) for key in KEYS}
        assert not self.overlaps, "two handlers ran at the same time for one key"

    def no_skip(self, count: int) -> None:
        """Fail if a key ever jumped forward over a message that had not come yet; a suffix may have come again."""
        for key in KEYS:
            highest = -1
            for number in self.seen[key]:
                assert number <= highest + 1, f"{key} skipped from {highest} to {number}: {self.seen[key]}"
                highest = max(highest, number)
            assert highest == count - 1, f"{key} ended at {highest}"


async def fill(broker: Broker, topic: Topic[str], start: int, end: int) -> None:
    for number in range(start, end):
        for key in KEYS:
            await broker.publish(topic, f"{key}/{number}", id=f"{key}/{number}", key=key)


@needs("topic.key_order")
class Ordering(Suite):
    async def test_one_consumer_gets_each_key_in_order(self, system: Harness) -> None:
        """O1: with as many messages in hand as there are keys."""
        topic, trace = system.topic(), Trace()
        async with system.connect() as broker, broker.subscribe(topic, group="g") as messages:
            await fill(broker, topic, 0, 12)
            for message in await system.drain(messages):
                trace.note(message.value)
        trace.exact(12)

    async def test_concurrent_handlers_keep_the_order_of_each_key(self, system: Harness) -> None:
        """O1: eight handlers at once, one per key at a time."""
        topic, trace = system.topic(), Trace()
        async with system.connect() as broker, system.serve(broker, topic, trace.handler(), concurrency=8):
            await fill(broker, topic, 0, 12)
            await system.eventually(lambda: trace.count >= 96)
            await system.settle_down()
        trace.exact(12)

    async def test_many_members_keep_the_order_of_each_key(self, system: Harness) -> None:
        """O2: three processes with four handlers each."""
        topic, trace = system.topic(), Trace()
        async with (
            system.connect() as one,
            system.connect() as two,
            system.connect() as three,
            system.serve(one, topic, trace.handler(), concurrency=4),
            system.serve(two, topic, trace.handler(), concurrency=4),
            system.serve(three, topic, trace.handler(), concurrency=4),
        ):
            await fill(one, topic, 0, 12)
            await system.eventually(lambda: trace.count >= 96)
            await system.settle_down()
        trace.exact(12)

    async def test_the_next_of_a_key_waits_for_the_one_in_hand(self, system: Harness) -> None:
        """O3: while it is unsettled the next is not delivered; other keys are."""
        topic = system.topic()
        async with system.connect() as broker, broker.subscribe(topic, group="g") as messages:
            await fill(broker, topic, 0, 3)
            taken = await system.take(messages, len(KEYS))
            assert sorted(m.value for m in taken) == [f"{key}/0" for key in KEYS]
            await system.nothing(messages)
            await taken[0].ack()
            (following,) = await system.take(messages, 1)
            assert following.value == f"{taken[0].key}/1"
            await system.nothing(messages)

    async def test_a_failed_message_holds_its_own_key_only(self, system: Harness) -> None:
        """O4: the others go on at once; then it comes again, before the next of its key."""
        topic, trace = system.topic(), Trace()
        wait = min(system.lease, 20.0)
        async with system.connect() as broker, broker.subscribe(topic, group="g") as messages:
            await broker.publish(topic, "k0/0", key="k0")
            (failed,) = await system.take(messages, 1)
            began = system.now()
            await failed.nack(delay=wait)
            await broker.publish(topic, "k0/1", key="k0")
            await fill_others(broker, topic, 3)
            for _ in range(3 * (len(KEYS) - 1)):
                (message,) = await system.take(messages, 1)
                assert message.key != "k0"
                trace.note(message.value)
                await message.ack()
            assert system.now() - began < wait, "other keys waited for the failed one"
            (again,) = await system.take(messages, 1)
            assert (again.value, again.attempt) == ("k0/0", 2)
            assert system.now() - began >= wait
            await system.nothing(messages)
            await again.ack()
            (following,) = await system.take(messages, 1)
            assert (following.value, following.attempt) == ("k0/1", 1)

    async def test_retries_and_dead_letters_keep_the_order_of_their_key(self, system: Harness) -> None:
        """O5: the key goes on when the message is done, or when its dead letter is stored."""
        topic, runs = system.topic(), list[str]()
        stored_before_next: list[int] = []
        async with system.connect() as broker:

            async def handle(message: Message[str]) -> None:
                runs.append(f"{message.value}#{message.attempt}")
                if message.value == "k0/1":
                    raise RuntimeError("always fails")
                if message.value == "k0/2":
                    stored_before_next.append(len(await system.browse(broker, topic.dead_letters("workers"))))

            for number in range(4):
                await broker.publish(topic, f"k0/{number}", key="k0")
            retry = RetryPolicy(attempts=3, wait_initial=system.quiet / 10)
            async with system.serve(broker, topic, handle, retry=retry, concurrency=4):
                await system.eventually(lambda: "k0/3#1" in runs)
        assert runs == ["k0/0#1", "k0/1#1", "k0/1#2", "k0/1#3", "k0/2#1", "k0/3#1"]
        assert stored_before_next == [1]

    async def test_the_order_holds_when_a_member_dies(self, system: Harness) -> None:
        """O6: the survivor may see a part again, but never skips."""
        topic, trace = system.topic(), Trace()
        async with system.connect() as broker:
            doomed = system.connect()
            async with (
                doomed,
                system.serve(broker, topic, trace.handler(), concurrency=4),
                system.serve(doomed, topic, trace.handler(), concurrency=4, drain=0),
            ):
                await fill(broker, topic, 0, 6)
                await system.crash(doomed)
                await fill(broker, topic, 6, 12)
                await system.eventually(lambda: all(11 in trace.seen[key] for key in KEYS))
        trace.no_skip(12)
        assert trace.count <= 12 * len(KEYS) + 2 * 32, "more came again than the dead member can have held"

    async def test_the_order_holds_when_members_come_and_go(self, system: Harness) -> None:
        """O6: nothing fails, so each rebalance repeats at most the message in hand of each key."""
        topic, trace = system.topic(), Trace()
        async with system.connect() as broker, system.serve(broker, topic, trace.handler(), concurrency=4):
            for number in range(0, 12, 3):
                async with (
                    system.connect() as guest,
                    system.serve(guest, topic, trace.handler(), concurrency=4),
                ):
                    await fill(broker, topic, number, number + 3)
            await system.eventually(lambda: all(11 in trace.seen[key] for key in KEYS))
        trace.no_skip(12)
        assert trace.count <= 12 * len(KEYS) + 8 * len(KEYS)

    @restarts
    async def test_the_order_holds_across_a_restart(self, system: Harness) -> None:
        """O6: a service that is stopped drains, so that nothing at all comes again."""
        topic, trace = system.topic(), Trace()
        async with system.connect() as broker:
            await fill(broker, topic, 0, 12)
        for _ in range(4):
            async with system.connect() as broker, system.serve(broker, topic, trace.handler(), concurrency=4):
                before = trace.count
                await system.reach(lambda: trace.count, min(96, before + 20))
            await system.restart()
        async with system.connect() as broker, system.serve(broker, topic, trace.handler(), concurrency=4):
            await system.eventually(lambda: trace.count >= 96)
            await system.settle_down()
        trace.exact(12)

    async def test_the_order_holds_across_a_disconnect(self, system: Harness) -> None:
        """O6: a part may come again, but nothing is skipped."""
        topic, trace = system.topic(), Trace()
        async with (
            system.connect() as broker,
            system.connect() as publisher,
            system.serve(broker, topic, trace.handler(), concurrency=4),
        ):
            await fill(publisher, topic, 0, 6)
            await system.disconnect(broker)
            await fill(publisher, topic, 6, 12)
            await system.settle_down()
            await system.reconnect(broker)
            await system.eventually(lambda: all(11 in trace.seen[key] for key in KEYS))
        trace.no_skip(12)

    async def test_each_producer_keeps_its_order_under_a_shared_key(self, system: Harness) -> None:
        """O7: two producers may mix, but neither is reordered."""
        topic = system.topic()
        async with system.connect() as one, system.connect() as two:

            async def produce(name: str, broker: Broker) -> None:
                for number in range(30):
                    await broker.publish(topic, f"{name}/{number}", key="shared")

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(produce("one", one))
                tasks.create_task(produce("two", two))
            async with one.subscribe(topic, group="g") as messages:
                values = [m.value for m in await system.drain(messages)]
        for name in ("one", "two"):
            assert [v for v in values if v.startswith(name)] == [f"{name}/{n}" for n in range(30)]


async def fill_others(broker: Broker, topic: Topic[str], count: int) -> None:
    for number in range(count):
        for key in KEYS[1:]:
            await broker.publish(topic, f"{key}/{number}", key=key)
