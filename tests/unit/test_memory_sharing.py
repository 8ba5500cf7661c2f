"""Queues of the memory driver: which consumer gets what, and what has to come alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from brokerkit.address import AnyQueue, Queue
from brokerkit.driver import Delivery
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.drivers.memory._queue import QueueStore
from brokerkit.policy import LONE_DELIVERY

from .memory_driver import consuming, done, ids, names, opened, put, run, take, turns

LEASE = 30.0
JOBS: AnyQueue = Queue("jobs", bytes, lease=LEASE)


async def die(made: MemoryDriver, queue: AnyQueue, count: int, name: str) -> list[Delivery]:
    """Take *count* records on a connection of its own and die with them; the lease has passed on return."""
    async with opened(url=f"memory://{name}") as doomed, consuming(doomed, queue) as consumer:
        taken = await take(consumer, count)
        doomed.faults.cut()
    await asyncio.sleep(LEASE)
    return taken


# ---------------------------------------------------------------------- who gets what


def test_what_is_ready_is_shared_by_all_who_were_woken() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as one, consuming(made, JOBS) as two:
            waiting = [asyncio.ensure_future(consumer.receive(100, 5)) for consumer in (one, two)]
            await turns()
            await put(made, JOBS, names(10))
            first, second = await asyncio.gather(*waiting)
            assert (len(first), len(second)) == (5, 5)

    run(main)


def test_a_small_consumer_leaves_its_share_to_the_others() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS, prefetch=1) as small, consuming(made, JOBS) as big:
            got: list[str] = []

            async def read() -> None:
                while batch := await big.receive(100, 5):
                    got.extend(ids(batch))

            waiting = asyncio.ensure_future(small.receive(100, 5))
            reading = asyncio.ensure_future(read())
            await turns()
            await put(made, JOBS, names(10))
            (mine,) = await waiting
            await reading
            assert sorted([mine.record.id, *got]) == names(10)

    run(main)


def test_one_record_wakes_one_consumer() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as one, consuming(made, JOBS) as two:
            waiting = [asyncio.ensure_future(consumer.receive(10, 5)) for consumer in (one, two)]
            await turns()
            await put(made, JOBS, ["a"])
            await turns()
            assert [task.done() for task in waiting] == [True, False]
            await put(made, JOBS, ["b"])
            await turns()
            assert [ids(task.result()) for task in waiting] == [["a"], ["b"]]

    run(main)


@pytest.mark.parametrize("why", ["cancelled", "frozen", "cut", "left", "prefetch"])
def test_a_woken_consumer_that_does_not_come_passes_it_on(why: str) -> None:
    async def main() -> None:
        async with (
            opened(JOBS, url=f"memory://pass-{why}") as made,
            opened(url=f"memory://pass-{why}") as other,
            consuming(made, JOBS) as second,
        ):
            context = consuming(other, JOBS)
            first = await context.__aenter__()
            woken = asyncio.ensure_future(first.receive(10, 500))
            await turns()
            waiting = asyncio.ensure_future(second.receive(10, 500))
            await turns()
            await put(made, JOBS, ["a"])  # wakes the first, which has not run yet
            if why == "cancelled":
                woken.cancel()
            elif why == "frozen":
                other.faults.freeze()
            elif why == "cut":
                other.faults.cut()
            elif why == "left":
                await context.__aexit__(None, None, None)
            else:
                first.prefetch = 0
            assert ids(await asyncio.wait_for(waiting, 1)) == ["a"]
            woken.cancel()
            await asyncio.wait([woken])
            await made.purge(JOBS)
            if why != "left":
                await context.__aexit__(None, None, None)

    run(main)


def test_a_consumer_whose_time_is_up_takes_what_woke_it() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            waiting = asyncio.ensure_future(consumer.receive(10, 3))
            asyncio.get_running_loop().call_later(3, lambda: asyncio.ensure_future(put(made, JOBS, ["a"])))
            got = await waiting
            assert ids(got or await consumer.receive(10, 1)) == ["a"]

    run(main)


# ---------------------------------------------------------------------- alone


def test_a_suspect_waits_until_nothing_else_is_in_hand() -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://alone1") as made:
            await put(made, JOBS, ["bad"])
            for _ in range(LONE_DELIVERY - 1):
                await die(made, JOBS, 1, "alone1")
            await put(made, JOBS, ["a", "b"])
            async with consuming(made, JOBS) as other, consuming(made, JOBS) as consumer:
                (bad,) = await consumer.receive(10, 1)
                assert (bad.record.id, bad.deliveries) == ("bad", LONE_DELIVERY)
                await other.receive(1, 1)
                await consumer.release([bad])
                # *other* holds something: it gets nothing more, so that it can take the suspect.
                assert not await other.receive(10, 1)
                waiting = asyncio.ensure_future(other.receive(10, 5))
                await turns()
                (bad,) = await consumer.receive(10, 1)  # an empty hand is quicker
                assert ids(await waiting) == ["b"], "nobody has to drain for it any more"
                assert not await consumer.receive(10, 1)
                await done(consumer, bad)
                assert not await consumer.receive(10, 1)

    run(main)


def test_a_consumer_drains_for_a_suspect_and_goes_on_after_it() -> None:
    async def main() -> None:
        async with opened(JOBS, url="memory://alone2") as made:
            await put(made, JOBS, ["bad"])
            await die(made, JOBS, 1, "alone2")
            async with consuming(made, JOBS, prefetch=1) as consumer, opened(url="memory://alone2") as doomed:
                async with consuming(doomed, JOBS) as dying:
                    await take(dying, 1)
                    await put(made, JOBS, names(4))
                    (held,) = await consumer.receive(10, 1)
                    consumer.prefetch = 100
                    doomed.faults.cut()
                await asyncio.sleep(LEASE)
                waiting = asyncio.ensure_future(consumer.receive(10, 100))
                await turns()
                assert not waiting.done()
                await done(consumer, held)
                (bad,) = await waiting
                assert (bad.record.id, bad.deliveries) == ("bad", 3)
                waiting = asyncio.ensure_future(consumer.receive(10, 100))
                await turns()
                assert not waiting.done()
                await done(consumer, bad)
                assert ids(await waiting) == ["m1", "m2", "m3"]

    run(main)


def test_only_as_many_consumers_drain_as_there_are_suspects() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            async with consuming(made, JOBS) as one, consuming(made, JOBS) as two, consuming(made, JOBS) as three:
                everyone = (one, two, three)
                await put(made, JOBS, names(3))
                for consumer in everyone:
                    await take(consumer, 1)
                await put(made, JOBS, ["bad"], deliveries=2)
                await put(made, JOBS, names(2, "new"))
                got = [ids(await consumer.receive(1, 0)) for consumer in everyone]
                assert got == [[], ["new0"], ["new1"]]
                # The one that drains leaves; another one has to do it, and the rest goes on.
            assert sorted(ids(await made.browse(JOBS, limit=10))) == ["bad", "m0", "m1", "m2", "new0", "new1"]

    run(main)


def test_who_waits_beside_a_suspect_waits_and_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    take_ = QueueStore.take

    def counted(*args: Any) -> list[Delivery]:
        nonlocal looks
        looks += 1
        return take_(*args)

    monkeypatch.setattr(QueueStore, "take", counted)

    async def main() -> None:
        async with (
            opened(JOBS) as made,
            consuming(made, JOBS) as one,
            consuming(made, JOBS) as two,
            consuming(made, JOBS) as three,
        ):
            await put(made, JOBS, names(3))
            held = [(await take(consumer, 1))[0] for consumer in (one, two, three)]
            waiting = [asyncio.ensure_future(consumer.receive(1, 50)) for consumer in (one, two, three)]
            await turns()
            await put(made, JOBS, ["bad"], deliveries=2)
            before = looks
            await turns(200)
            assert looks - before <= 6
            await done(one, held[0])
            await done(two, held[1])
            await done(three, held[2])
            assert [ids(got) for got in await asyncio.gather(*waiting) if got] == [["bad"]]

    run(main)


def test_purging_a_suspect_lets_a_draining_consumer_go_on() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            await put(made, JOBS, ["a"])
            await take(consumer, 1)
            await put(made, JOBS, ["bad"], deliveries=2)
            waiting = asyncio.ensure_future(consumer.receive(10, 100))
            await turns()
            assert not waiting.done()
            assert await made.purge(JOBS) == 1
            await put(made, JOBS, ["b"])
            assert ids(await asyncio.wait_for(waiting, 1)) == ["b"]

    run(main)
