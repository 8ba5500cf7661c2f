"""What others get wrong: each defect that was found in a broker library of today, as a test of ours.

The labels are those of the experiments in which FastStream, taskiq, kombu and broadcaster failed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from ...errors import NotFound
from ...events import DeadLettered
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness, Kind
from ._raw import Raw
from ._runner import Suite, needs, seeds


def _grown(handled: Counter[str], to: int) -> bool:
    return len(handled) >= to


class Peers(Suite):
    async def test_a_failed_message_runs_again(self, system: Harness, kind: Kind) -> None:
        """E1: after an exception, after a nack, and by itself: no other message has to come, nobody to restart."""
        address = system.address(kind)
        runs: Counter[str] = Counter()

        async def handler(message: Message[str]) -> None:
            runs[message.value] += 1
            if message.attempt == 1:
                if message.value == "raised":
                    raise LookupError
                await message.nack()

        policy = RetryPolicy(attempts=3, wait_initial=0.01)
        async with system.connect() as broker, system.serve(broker, address, handler, retry=policy):
            await system.publish(broker, address, ["raised", "nacked"])
            await system.eventually(lambda: runs["raised"] == runs["nacked"] == 2)
            await system.settle_down()
        assert runs == {"raised": 2, "nacked": 2}

    async def test_a_rejected_message_is_gone_and_kept(self, system: Harness, kind: Kind) -> None:
        """E1: reject is not ignored: it does not run again, and is among the dead letters."""
        address = system.address(kind)
        async with system.connect() as broker:
            async with system.subscribe(broker, address) as messages:
                await system.publish(broker, address, ["v"])
                (message,) = await system.take(messages, 1)
                await message.reject("no")
                await system.nothing(messages)
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)
            assert [letter.value for letter in await system.browse(broker, system.letters(address))] == ["v"]

    async def test_a_graceful_stop_loses_and_strands_nothing(self, system: Harness, kind: Kind) -> None:
        """E2, E10, E11: a hundred messages, stopped after some, restarted: each handled exactly once, at once."""
        address = system.address(kind)
        handled: Counter[str] = Counter()

        async def handler(message: Message[str]) -> None:
            await asyncio.sleep(0.02)
            handled[message.value] += 1

        async with system.connect() as publisher:
            await system.publish(publisher, address, [f"v{n}" for n in range(100)])
        for _ in range(4):
            async with system.connect() as broker, system.serve(broker, address, handler, concurrency=3):
                await system.eventually(partial(_grown, handled, len(handled) + 10))
        assert 40 <= len(handled) < 100
        async with system.connect() as broker, system.serve(broker, address, handler, concurrency=3):
            began = system.now()
            await system.eventually(lambda: len(handled) == 100)
            assert system.now() - began < system.session, "the rest was stranded with a member that is gone"
            await system.settle_down()
        assert set(handled.values()) == {1}

    async def test_a_handler_cut_off_by_the_drain_runs_again_after_a_restart(self, system: Harness, kind: Kind) -> None:
        """E9: longer than the drain: it is cancelled, and handled by the next process, at once."""
        address = system.address(kind)
        runs: list[int] = []

        async def handler(message: Message[str]) -> None:
            runs.append(message.attempt)
            if len(runs) == 1:
                await asyncio.sleep(system.deadline)

        async with system.connect() as broker, system.serve(broker, address, handler, drain=0.1):
            await system.publish(broker, address, ["v"])
            await system.eventually(lambda: runs)
        async with system.connect() as broker, system.serve(broker, address, handler):
            began = system.now()
            await system.eventually(lambda: len(runs) == 2)
            assert system.now() - began < min(system.session, system.lease)
        assert runs == [1, 1]

    async def test_a_handler_longer_than_the_lease_runs_once(self, system: Harness, kind: Kind) -> None:
        """E13, E4-B: with two consumers beside it, and one after it."""
        address = system.address(kind)
        runs: list[str] = []

        async def handler(message: Message[str]) -> None:
            runs.append(message.value)
            if message.value == "long":
                await asyncio.sleep(4 * system.gone(kind))

        async with (
            system.connect() as one,
            system.connect() as two,
            system.serve(one, address, handler, concurrency=2, timeout=None),
            system.serve(two, address, handler, concurrency=2, timeout=None),
        ):
            await system.publish(one, address, ["long"])
            await system.eventually(lambda: runs)
            await system.publish(one, address, ["short"])
            await asyncio.sleep(5 * system.gone(kind))
        assert sorted(runs) == ["long", "short"]

    async def test_a_poison_message_does_not_run_for_ever(self, system: Harness, kind: Kind) -> None:
        """E13: as often as the policy says, with waits in between, then it is a dead letter."""
        address = system.address(kind)
        runs: list[float] = []

        async def handler(message: Message[str]) -> None:
            runs.append(system.now())
            raise LookupError

        policy = RetryPolicy(attempts=4, wait_initial=system.quiet / 10, wait_jitter=0)
        async with system.connect() as broker, system.serve(broker, address, handler, retry=policy):
            await system.publish(broker, address, ["v"])
            await system.eventually(lambda: system.seen(DeadLettered))
            await asyncio.sleep(4 * system.quiet)
        gaps = [later - sooner for sooner, later in pairwise(runs)]
        assert len(runs) == 4
        assert all(gap >= system.quiet / 10 * 2**n * 0.999 for n, gap in enumerate(gaps))

    async def test_health_is_bad_when_a_subscription_has_stopped(self, system: Harness, kind: Kind) -> None:
        """E10b: the connection answers, and nothing is consumed any more: health says so, and by name."""
        broken, fine = system.address(kind, "broken"), system.address(kind, "fine")

        async def handler(message: Message[str]) -> None:
            pass

        async with (
            system.connect() as broker,
            system.connect() as admin,
            system.serve(broker, broken, handler),
            system.serve(broker, fine, handler),
        ):
            assert (await broker.health()).ok
            await admin.delete(broken)

            async def bad() -> bool:
                return not (await broker.health()).ok

            await system.eventually(bad)
            problems = (await broker.health()).problems
            assert any("broken" in problem for problem in problems)
            assert not any("fine" in problem for problem in problems)

    async def test_a_publish_survives_a_short_outage(self, system: Harness, kind: Kind) -> None:
        """E7: the first publish after a cut connection does not fail, and is stored once."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.publish(address, "before")
            await system.disconnect(broker)
            publishing = asyncio.ensure_future(broker.publish(address, "during", timeout=system.deadline))
            await asyncio.sleep(system.quiet / 5)
            await system.reconnect(broker)
            await publishing
            async with system.subscribe(broker, address) as messages:
                assert sorted(m.value for m in await system.drain(messages)) == ["before", "during"]

    async def test_a_cut_connection_does_not_silence_a_subscriber(self, system: Harness, kind: Kind) -> None:
        """E6, E7: it comes back soon, by itself; not after a fixed pause, and not only with the next error."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        async with (
            system.connect() as publisher,
            system.connect() as broker,
            system.serve(broker, address, handler),
        ):
            await system.disconnect(broker)
            await asyncio.sleep(0.2)
            await system.reconnect(broker)
            await publisher.publish(address, "after")
            await system.eventually(lambda: handled == ["after"], within=system.session + system.lease + 10)

    async def test_what_a_dead_worker_held_is_recovered_on_an_idle_address(self, system: Harness, kind: Kind) -> None:
        """E4-A: no new message has to arrive for it."""
        address = system.address(kind)
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)

        doomed = system.connect()
        async with system.connect() as broker:
            await system.publish(broker, address, ["v"])
            async with doomed, system.subscribe(doomed, address) as held:
                await system.take(held, 1)
                await system.crash(doomed)
            async with system.serve(broker, address, handler):
                await system.eventually(lambda: handled == ["v"], within=2 * system.gone(kind))

    async def test_a_failing_task_is_not_acknowledged(self, system: Harness, kind: Kind) -> None:
        """E4-C: after an exception the message is anything but done."""
        address = system.address(kind)
        runs: list[int] = []

        async def handler(message: Message[str]) -> None:
            runs.append(message.attempt)
            raise LookupError

        policy = RetryPolicy(attempts=50, wait_initial=1, wait_max=1)
        async with system.connect() as broker:
            async with system.serve(broker, address, handler, retry=policy):
                await system.publish(broker, address, ["v"])
                await system.eventually(lambda: runs)
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                assert message.attempt == len(runs) + 1
                await message.ack()

    async def test_an_unknown_message_goes_to_the_dead_letters(self, system: Harness, kind: Kind) -> None:
        """E11b: what this version of the program cannot read is not dropped with a warning; a later one redrives it."""
        old = system.address(kind, "orders", int)
        new = system.address(kind, "orders", str)
        handled: list[Any] = []

        async def handler(message: Message[Any]) -> None:
            handled.append(message.value)

        async def stored() -> bool:
            return bool(await system.browse(broker, system.letters(old)))

        async with system.connect() as publisher, system.connect() as broker:
            async with system.serve(broker, old, handler):
                await publisher.publish(new, "of a later version")
                await system.eventually(lambda: system.seen(DeadLettered))
                await system.eventually(stored)
                (letter,) = await system.browse(broker, system.letters(old))
                assert letter.body == b"of a later version"
            async with system.serve(publisher, new, handler):
                await publisher.redrive(system.letters(new))
                await system.eventually(lambda: handled == ["of a later version"])

    async def test_acknowledging_a_later_message_does_not_acknowledge_an_earlier_one(
        self, system: Harness, kind: Kind
    ) -> None:
        """Offsets: of ten in hand the last is acknowledged, and the process dies: the other nine come again."""
        address = system.address(kind)
        doomed = system.connect()
        async with system.connect() as broker:
            async with doomed, system.subscribe(doomed, address) as held:
                if kind == "topic":
                    for number in range(10):
                        await broker.publish(system.topic(), f"v{number}", key=f"k{number}")
                else:
                    await system.publish(broker, address, [f"v{n}" for n in range(10)])
                taken = await system.take(held, 10)
                await taken[-1].ack(confirm=True)
                await system.crash(doomed)
            async with system.subscribe(broker, address) as messages:
                again = await system.take(messages, 9, within=2 * system.gone(kind))
                assert {m.value for m in again} == {m.value for m in taken[:-1]}
                for message in again:
                    await message.ack()
                await system.nothing(messages)

    @seeds(1)
    async def test_nothing_is_trimmed_unread(self, system: Harness, kind: Kind) -> None:
        """E4: three thousand messages wait for a consumer that comes late; all are there."""
        address = system.address(kind)
        async with system.connect() as broker:
            async with system.subscribe(broker, address):
                pass
            for part in range(3):
                await broker.publish_many(address, [f"{part}-{n}" for n in range(1000)])
            async with system.subscribe(broker, address, prefetch=500) as messages:
                assert len({m.value for m in await system.drain(messages)}) == 3000

    @needs("bounded")
    async def test_a_full_system_refuses_instead_of_dropping_the_oldest(self, system: Harness, kind: Kind) -> None:
        """E4: a limit is told to the publisher; what was confirmed and is unread stays."""
        address = system.address(kind)
        async with system.connect(options=system.bounded) as broker:
            async with system.subscribe(broker, address):
                pass
            results = await broker.publish_many(address, [f"v{n}" for n in range(60)], timeout=system.quiet)
            stored = [r.id for r in results if not isinstance(r, BaseException)]
            assert 0 < len(stored) < 60
            async with system.subscribe(broker, address) as messages:
                assert sorted(m.id for m in await system.drain(messages)) == sorted(stored)

    async def test_publishing_to_nowhere_does_not_pass_silently(self, system: Harness, kind: Kind) -> None:
        """E3: without the address it is an error; with it the message waits, although nobody listens."""
        address = system.address(kind)
        async with system.connect(declare="check") as broker:
            with pytest.raises(NotFound):
                await broker.publish(address, "v")
        async with system.connect() as broker:
            await broker.publish(address, "v")
            async with system.subscribe(broker, address) as messages:
                assert len(await system.take(messages, 1)) == 1

    async def test_the_publisher_does_not_see_what_the_handler_raises(self, system: Harness, kind: Kind) -> None:
        """E3: in tests neither; a nacked message is delivered again in tests too."""
        address = system.address(kind)
        runs: list[int] = []

        async def handler(message: Message[str]) -> None:
            runs.append(message.attempt)
            if message.attempt == 1:
                raise LookupError

        policy = RetryPolicy(attempts=2, wait_initial=0.01)
        async with system.connect() as broker, system.serve(broker, address, handler, retry=policy):
            receipt = await broker.publish(address, "v")
            assert receipt.id
            await system.eventually(lambda: runs == [1, 2])

    async def test_a_crash_between_receiving_and_handling_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """E8: at whatever moment of its fetching the process dies, every message is handled by another."""
        address = system.address(kind)
        async with system.connect() as broker:
            for steps in range(12):
                await system.publish(broker, address, [f"{steps}a", f"{steps}b"])
                doomed = system.connect()
                async with doomed:
                    subscription = system.subscribe(doomed, address)
                    entering = asyncio.ensure_future(subscription.__aenter__())
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    await system.crash(doomed)
                    await asyncio.wait([entering])
                    if not entering.cancelled() and entering.exception() is None:
                        await subscription.__aexit__(None, None, None)
                async with system.subscribe(broker, address) as messages:
                    again = await system.take(messages, 2, within=2 * system.gone(kind))
                    assert {m.value for m in again} == {f"{steps}a", f"{steps}b"}
                    for message in again:
                        await message.ack(confirm=True)

    async def test_a_slow_consumer_does_not_hold_everything_for_itself(self, system: Harness, kind: Kind) -> None:
        """E11: what is prefetched is bounded, so that a second process has something to do."""
        address = system.address(kind)
        handled: Counter[int] = Counter()

        def handler(number: int) -> Any:
            async def handle(message: Message[str]) -> None:
                await asyncio.sleep(0.02)
                handled[number] += 1

            return handle

        async with system.connect() as one, system.connect() as two:
            await one.declare(address)
            async with system.serve(one, address, handler(1)), system.serve(two, address, handler(2)):
                await system.settle_down()
                await one.publish_many(address, [f"v{n}" for n in range(200)])
                await system.eventually(lambda: sum(handled.values()) == 200)
        assert min(handled[1], handled[2]) > 40

    async def test_a_foreign_message_in_the_middle_stops_nobody(self, system: Harness, kind: Kind) -> None:
        """E11b: bytes that are no message of ours: a dead letter, and the next one is handled."""
        address = system.address(kind, type=int)
        handled: list[int] = []

        async def handler(message: Message[int]) -> None:
            handled.append(message.value)

        async with system.connect() as broker, system.serve(broker, address, handler):
            raw = Raw(system, broker)
            native = system.native(broker, address)
            for number in range(5):
                await broker.publish(address, number)
                await raw.publish([raw.record(native, f"foreign{number}", bytes([number, 255]))])
            await system.eventually(lambda: len(handled) == 5 and len(system.seen(DeadLettered)) == 5)
            await system.settle_down()
        assert sorted(handled) == [0, 1, 2, 3, 4]
