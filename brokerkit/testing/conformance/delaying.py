"""DELAY: never early, soon after its time, and nothing else is held up."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from datetime import datetime, timedelta

import pytest

from ...clock import current
from ...errors import ConfigError
from ...policy import MAX_DELAY
from ._harness import Harness
from ._runner import Suite, needs, restarts, seeds


@needs("queue.delay")
class Delaying(Suite):
    async def test_a_delayed_message_is_never_early_and_soon_there(self, system: Harness) -> None:
        """D1, D2: each of forty different delays, with a consumer waiting all the time."""
        queue = system.queue()
        due: dict[str, tuple[float, float]] = {}
        came: dict[str, float] = {}
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:

            async def publish() -> None:
                for number in range(40):
                    delay = 2 * system.lease * (number * 17 % 40) / 40
                    began = system.now()
                    await broker.publish(queue, "value", id=f"v{number}", delay=delay)
                    due[f"v{number}"] = began + delay, system.now() + delay

            publishing = asyncio.ensure_future(publish())
            while len(came) < 40:
                for message in await system.take(messages, 1):
                    came[message.id] = system.now()
                    assert (message.attempt, message.deliveries) == (1, 1)
                    await message.ack()
            await publishing
        for id, (first, last) in due.items():
            assert came[id] >= first, f"{id} came {first - came[id]:.3f} s early"
            assert came[id] <= last + system.quiet, f"{id} came {came[id] - last:.3f} s late"

    async def test_a_delay_wakes_a_consumer_that_waits(self, system: Harness) -> None:
        """D2: nothing else happens on the queue meanwhile."""
        queue = system.queue()
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:
            waiting = asyncio.ensure_future(system.take(messages, 1))
            await asyncio.sleep(system.quiet)
            began = system.now()
            await broker.publish(queue, "a", delay=system.lease)
            published = system.now()
            (message,) = await waiting
            assert began + system.lease <= system.now() <= published + system.lease + system.quiet
            await message.ack()

    @restarts
    async def test_a_delay_survives_the_death_of_everybody(self, system: Harness) -> None:
        """D3: neither the publisher nor a consumer has to live on for it."""
        queue = system.queue()
        began = system.now()
        doomed = system.connect()
        async with doomed, system.subscribe(doomed, queue):
            await doomed.publish(queue, "a", id="a", delay=2 * system.lease)
            await system.crash(doomed)
        await system.restart()
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:
            (message,) = await system.take(messages, 1)
            assert (message.id, message.deliveries) == ("a", 1)
            assert 2 * system.lease <= system.now() - began
            await message.ack()

    async def test_a_delay_that_ends_while_nobody_is_there_is_over_when_somebody_comes(self, system: Harness) -> None:
        """D3: all processes are gone for longer than the delay; what was due meanwhile comes once, and soon."""
        queue = system.queue()
        async with system.connect() as broker:
            for number in range(5):
                await broker.publish(queue, "v", id=f"v{number}", delay=(1 + number / 4) * system.lease)
            await broker.publish(queue, "v", id="later", delay=8 * system.lease)
        began = system.now()
        await asyncio.sleep(3 * system.lease)
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:
            taken = await system.take(messages, 5, within=4 * system.lease)
            assert sorted(m.id for m in taken) == [f"v{number}" for number in range(5)]
            assert {m.deliveries for m in taken} == {1}
            for message in taken:
                await message.ack()
            (last,) = await system.take(messages, 1)
            assert last.id == "later"
            assert system.now() - began >= 8 * system.lease - system.quiet
            await last.ack(confirm=True)
            await system.nothing(messages)

    @seeds(1)
    async def test_ten_thousand_messages_of_the_same_time_all_come(self, system: Harness) -> None:
        """D4: none is lost, none comes twice, none early."""
        queue = system.queue()
        seen: Counter[str] = Counter()
        async with system.connect() as broker, system.subscribe(broker, queue, prefetch=1000) as messages:
            began = system.now()
            for start in range(0, 10_000, 1000):
                batch = [queue.outgoing("v", id=str(n), delay=5 * system.lease) for n in range(start, start + 1000)]
                assert len(await broker.publish_many(queue, batch)) == 1000
            delayed = (await broker.backlog(queue)).delayed
            assert delayed is None or 9_000 <= delayed <= 11_000, "counts are approximate while something goes on"
            while len(seen) < 10_000:
                got = await messages.receive(limit=1000, timeout=system.deadline)
                assert got
                assert system.now() - began >= 5 * system.lease
                for message in got:
                    seen[message.id] += 1
                    await message.ack()
            await system.nothing(messages)
        assert seen == Counter(str(n) for n in range(10_000))

    async def test_a_short_delay_is_not_held_up_by_a_long_one(self, system: Harness) -> None:
        """D5: they come in the order of their times, whatever the order of publishing."""
        queue = system.queue()
        unit = system.quiet / 2
        async with system.connect() as broker, system.subscribe(broker, queue, prefetch=1) as messages:
            await broker.publish(queue, "first", delay=system.lease)  # what that takes for the first time is not asked
            (message,) = await system.take(messages, 1)
            await message.ack()
            began = system.now()
            for number in (8, 1, 6, 3, 0, 7, 2, 5, 4):
                await broker.publish(queue, str(number), delay=unit * number)
            published = system.now()
            order: list[str] = []
            for number in range(9):
                (message,) = await system.take(messages, 1)
                assert began + unit * number <= system.now() < published + unit * number + system.quiet
                order.append(message.value)
                await message.ack()
        assert order == [str(n) for n in range(9)]

    async def test_what_is_ready_does_not_wait_for_what_is_delayed(self, system: Harness) -> None:
        """D5: a thousand delayed messages take no credit and no time from the others."""
        queue = system.queue()
        async with system.connect() as broker, system.subscribe(broker, queue, prefetch=10) as messages:
            late = [queue.outgoing("late", delay=10 * system.lease) for _ in range(1000)]
            await broker.publish_many(queue, late)
            await system.publish(broker, queue, [f"v{n}" for n in range(30)])
            for _ in range(30):
                (message,) = await system.take(messages, 1, within=system.quiet)
                assert message.value != "late"
                await message.ack()

    async def test_a_delay_outside_of_its_bounds_is_refused(self, system: Harness) -> None:
        """D6: negative, endless, too long, no number, a time without a zone: ConfigError, and nothing is stored."""
        queue = system.queue()
        bad = (-1, -0.001, MAX_DELAY + 1, math.inf, -math.inf, math.nan, True, "5", datetime(2030, 1, 1))  # noqa: DTZ001
        async with system.connect() as broker:
            for delay in bad:
                with pytest.raises(ConfigError, match="delay"):
                    await broker.publish(queue, "bad", delay=delay)  # type: ignore[arg-type]
            async with system.subscribe(broker, queue) as messages:
                await broker.publish(queue, "now", delay=0)
                await broker.publish(queue, "also now", delay=0.0)
                taken = await system.take(messages, 2, within=system.quiet)
                assert sorted(m.value for m in taken) == ["also now", "now"]
                for message in taken:
                    await message.ack()
                await broker.publish(queue, "some day", delay=MAX_DELAY)
                await system.nothing(messages)
            backlog = await broker.backlog(queue)
            assert (backlog.waiting, backlog.delayed) in {(0, 1), (None, None)}

    async def test_a_point_in_time_is_kept(self, system: Harness) -> None:
        """D6: a datetime with a zone; one that is over means now."""
        queue = system.queue()
        async with system.connect() as broker, system.subscribe(broker, queue) as messages:
            now = datetime.fromtimestamp(current().time()).astimezone()
            began = system.now()
            await broker.publish(queue, "soon", delay=now + timedelta(seconds=system.lease))
            await broker.publish(queue, "past", delay=now - timedelta(days=1))
            published = system.now()
            (past,) = await system.take(messages, 1, within=system.quiet)
            (soon,) = await system.take(messages, 1)
            assert (past.value, soon.value) == ("past", "soon")
            assert began + system.lease - 0.01 <= system.now() <= published + system.lease + system.quiet

    async def test_seconds_of_delay_do_not_depend_on_the_publishers_clock(self, system: Harness) -> None:
        """D7: an hour ahead or behind, when publishing or while it waits, changes nothing."""
        for ahead in (3600.0, -3600.0):
            queue = system.queue("ahead" if ahead > 0 else "behind")
            async with system.connect() as broker, system.subscribe(broker, queue) as messages:
                began = system.now()
                with system.wall_clock(ahead):
                    await broker.publish(queue, "published with a wrong clock", delay=system.lease)
                await broker.publish(queue, "published with the right one", delay=system.lease)
                published = system.now()
                with system.wall_clock(ahead):
                    for message in await system.take(messages, 2):
                        assert began + system.lease <= system.now() <= published + system.lease + system.quiet
                        await message.ack()

    async def test_a_delay_longer_than_the_lease_delivers_once(self, system: Harness) -> None:
        """D9: two consumers wait; one of them gets the message, at its time, for the first time."""
        queue = system.queue()
        async with (
            system.connect() as one,
            system.connect() as two,
            system.subscribe(one, queue) as first,
            system.subscribe(two, queue) as second,
        ):
            began = system.now()
            for number in range(20):
                await one.publish(queue, "v", id=f"v{number}", delay=4 * system.lease)
            waits = [system.drain(messages, quiet=7 * system.lease) for messages in (first, second)]
            got = [message for part in await asyncio.gather(*waits) for message in part]
        assert sorted(m.id for m in got) == sorted(f"v{n}" for n in range(20))
        assert {m.deliveries for m in got} == {1}
        assert system.now() - began >= 4 * system.lease
