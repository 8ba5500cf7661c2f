"""What the memory driver does not do: wait, starve others, set timers, keep what is gone."""

from __future__ import annotations

import asyncio
import functools
import gc
import time
import weakref
from datetime import UTC, datetime
from typing import Any

import pytest

from brokerkit.address import AnyQueue, AnyTopic, Queue, Topic
from brokerkit.driver import Delivery, Record, Settlement, Source
from brokerkit.drivers.memory._driver import _CACHE
from brokerkit.drivers.memory._timers import Timers
from brokerkit.policy import Start

from .memory_driver import (
    at_once,
    consuming,
    done,
    ids,
    names,
    opened,
    put,
    rest,
    results,
    run,
    take,
    turns,
)

LEASE = 30.0
SESSION = 10.0
JOBS: AnyQueue = Queue("jobs", bytes, lease=LEASE)
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)


def test_publishing_and_settling_wait_for_nothing() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made, consuming(made, JOBS) as jobs, consuming(made, ORDERS) as orders:
            for address, consumer in ((JOBS, jobs), (ORDERS, orders)):
                records = [Record(address, id, b"") for id in names(20)]
                assert len(at_once(made.publish(records, timeout=1))) == 20
                assert len(at_once(made.publish(records[:1], timeout=1))) == 1
                got: list[Delivery] = []
                while len(got) < 21:
                    got += at_once(consumer.receive(100, 1))
                copies = (Record(JOBS.dead_letters, "a", b""),)
                assert at_once(consumer.settle([Settlement(d, copies) for d in got], confirm=True)) == [None] * 21

    run(main)


def test_busy_publishers_and_consumers_let_others_run() -> None:
    async def main() -> None:
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            steps = 0

            async def other() -> None:
                nonlocal steps
                while True:
                    steps += 1
                    await asyncio.sleep(0)

            task = asyncio.ensure_future(other())
            for number in range(2000):
                await put(made, JOBS, [f"m{number}"])
            assert 15 <= steps <= 40
            steps = 0
            for _ in range(1000):
                await done(consumer, *await consumer.receive(1, 1))
            assert 8 <= steps <= 20
            await rest(consumer)
            task.cancel()

    run(main)


def test_a_busy_consumer_sets_no_timers_and_leaves_none() -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        call_at = loop.call_at
        timers: list[float] = []

        def counted(when: float, *args: Any, **options: Any) -> Any:
            timers.append(when)
            return call_at(when, *args, **options)

        loop.call_at = counted
        async with opened(JOBS, ORDERS) as made, consuming(made, JOBS) as jobs, consuming(made, ORDERS) as orders:
            for address, consumer in ((JOBS, jobs), (ORDERS, orders)):
                timers.clear()
                for number in range(300):
                    waiting = asyncio.ensure_future(consumer.receive(10, 60))
                    await turns(2)
                    await put(made, address, [f"m{number}"])
                    await done(consumer, *await waiting)
                assert len(timers) <= 1
            assert not await jobs.receive(1, 7)
            assert loop.time() == pytest.approx(7)
        assert [handle for handle in loop._scheduled if not handle.cancelled()] == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main)


def test_a_shorter_wait_after_a_longer_one_is_not_longer() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with opened(JOBS) as made, consuming(made, JOBS) as consumer:
            for wait in (50.0, 1.0, 0.0, 20.0):
                waiting = asyncio.ensure_future(consumer.receive(1, wait))
                await turns()
                if wait == 50:
                    waiting.cancel()
                    await asyncio.wait([waiting])
                    continue
                began = loop.time()
                assert await waiting == []
                assert loop.time() == pytest.approx(began + wait) or wait == 0
            waiting = asyncio.ensure_future(consumer.receive(1, float("inf")))
            await asyncio.sleep(10**6)
            assert not waiting.done()
            await put(made, JOBS, ["a"])
            assert ids(await waiting) == ["a"]

    run(main)


def test_addresses_made_on_the_way_are_not_kept() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            for number in range(2 * _CACHE):
                address: AnyQueue = Queue("jobs", bytes)
                assert await results(made, address, [str(number)]) == [None]
            assert len(made._stores) == len(made._known) <= _CACHE

    run(main)


def test_a_private_server_goes_with_its_connection() -> None:
    found: list[weakref.ref[object]] = []

    async def main() -> None:
        async with opened(JOBS, ORDERS) as made, consuming(made, JOBS) as jobs, consuming(made, ORDERS) as orders:
            for address, consumer in ((JOBS, jobs), (ORDERS, orders)):
                await put(made, address, names(10))
                await take(consumer, 3)
            found.append(weakref.ref(made.server))

    run(main)
    gc.collect()
    assert found[0]() is None


# ---------------------------------------------------------------------- time


def test_timers_run_in_time_and_order_and_never_early() -> None:
    async def main() -> None:
        timers = Timers()
        loop = asyncio.get_running_loop()
        timers.bind(loop)
        seen: list[tuple[str, float]] = []

        def note(name: str) -> None:
            seen.append((name, loop.time()))

        for name, when in (("c", 3.0), ("a", 1.0), ("b", 1.0), ("d", 2.0)):
            timers.at(when, functools.partial(note, name))
        await asyncio.sleep(2.5)
        timers.unbind()
        await asyncio.sleep(2.5)
        assert seen == [("a", 1.0), ("b", 1.0), ("d", 2.0)]
        timers.bind(loop)
        await asyncio.sleep(0.5)
        assert [name for name, _ in seen] == ["a", "b", "d", "c"]

    run(main)


def test_in_a_usual_loop_the_time_is_the_systems() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made, consuming(made, JOBS) as consumer:
            before = time.time()
            await put(made, JOBS, ["a"], ttl=3600, timestamp=before - 50)
            (a,) = await take(consumer, 1)
            assert before + 3599 < (a.record.expires or 0) < time.time() + 3601
            assert 49 < ((await made.backlog(Source(JOBS))).oldest_age or 0) < 60
            await put(made, JOBS, ["late"], delay=0.03)
            began = time.monotonic()
            assert ids(await consumer.receive(1, 5)) == ["late"]
            assert 0.03 <= time.monotonic() - began < 2
            await put(made, ORDERS, names(4))
            start = Start.at(datetime.fromtimestamp(before - 1, UTC))
            assert len(await made.browse(ORDERS, limit=9, start=start)) == 4
            start = Start.at(datetime.fromtimestamp(time.time() + 60, UTC))
            assert await made.browse(ORDERS, limit=9, start=start) == []

    asyncio.run(main())


def test_a_timer_of_the_loop_that_fires_early_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        timers = Timers()
        loop = asyncio.get_running_loop()
        call_later: Any = loop.call_later

        def hurried(delay: float, *call: Any) -> Any:
            return call_later(max(0, delay - 0.0004), *call)

        monkeypatch.setattr(loop, "call_later", hurried)
        timers.bind(loop)
        seen: list[float] = []
        timers.at(1.0, lambda: seen.append(timers.now()))
        await asyncio.sleep(2)
        assert len(seen) == 1
        assert 1.0 <= seen[0] < 1.01

    run(main)
