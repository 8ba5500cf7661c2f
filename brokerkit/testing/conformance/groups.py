"""GROUPS: how members share a topic or a queue, come and go, and what a group remembers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from ...broker import Broker
from ...message import Message
from ...policy import Start
from ._harness import Harness, Kind
from ._runner import Suite, needs, restarts


class Groups(Suite):
    @needs("topic")
    async def test_two_groups_both_get_everything(self, system: Harness) -> None:
        """G1: what one group acknowledges stays there for the other."""
        topic = system.topic()
        async with (
            system.connect() as broker,
            broker.subscribe(topic, group="one") as one,
            broker.subscribe(topic, group="two") as two,
        ):
            sent = [f"v{n}" for n in range(50)]
            await system.publish(broker, topic, sent)
            assert sorted(m.value for m in await system.drain(one)) == sorted(sent)
            assert sorted(m.value for m in await system.drain(two)) == sorted(sent)

    async def test_members_share_without_loss_and_without_repeats(self, system: Harness, kind: Kind) -> None:
        """G2: three processes, nothing fails: each message is handled exactly once."""
        address = system.address(kind)
        seen: Counter[str] = Counter()
        async with system.connect() as one, system.connect() as two, system.connect() as three:

            async def consume(broker: Broker) -> None:
                async with system.subscribe(broker, address, prefetch=10) as messages:
                    seen.update(m.id for m in await system.drain(messages))

            async with asyncio.TaskGroup() as tasks:
                for broker in (one, two, three):
                    tasks.create_task(consume(broker))
                for number in range(150):
                    await system.publish(one, address, [f"v{number}"], key=f"k{number % 20}")
            async with system.subscribe(one, address) as messages:
                seen.update(m.id for m in await system.drain(messages))
        assert sorted(seen) == sorted(f"v{n}" for n in range(150))
        assert max(seen.values()) == 1, f"repeats without a fault: {[i for i, n in seen.items() if n > 1]}"

    async def test_members_that_come_and_go_lose_nothing(self, system: Harness, kind: Kind) -> None:
        """G3: each change of the membership repeats at most what was in hand."""
        address = system.address(kind)
        seen: Counter[str] = Counter()
        changes, prefetch, total = 0, 5, 200
        async with system.connect() as broker:
            await system.publish(broker, address, ["v0"], key="k0")
            stop = asyncio.Event()

            async def member(stays: int | None) -> None:
                nonlocal changes
                async with (
                    system.connect() as own,
                    system.subscribe(own, address, prefetch=prefetch) as messages,
                ):
                    changes += 1
                    while not stop.is_set() and stays != 0:
                        for message in await messages.receive(limit=3, timeout=0.05):
                            await asyncio.sleep(0.002)
                            await message.ack()
                            seen[message.id] += 1
                        stays = stays and stays - 1
                    changes += 1

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(member(None))
                for number in range(1, total):
                    await system.publish(broker, address, [f"v{number}"], key=f"k{number % 13}")
                    if number % 25 == 0:
                        tasks.create_task(member(4))
                await system.eventually(lambda: len(seen) == total)
                stop.set()
        assert sorted(seen) == sorted(f"v{n}" for n in range(total))
        assert changes > 10
        assert sum(seen.values()) - total <= changes * prefetch

    @needs("shared")
    async def test_every_consumer_gets_a_share(self, system: Harness, kind: Kind) -> None:
        """G4: where the capability says so, more consumers than partitions work at the same time."""
        address = system.address(kind)
        async with system.connect() as broker, asyncio.TaskGroup() as tasks:
            full = [asyncio.Event() for _ in range(12)]

            async def consume(event: asyncio.Event) -> None:
                async with system.subscribe(broker, address, prefetch=1) as messages:
                    (message,) = await system.take(messages, 1)
                    event.set()
                    for other in full:
                        await other.wait()
                    await message.ack()

            for event in full:
                tasks.create_task(consume(event))
            await system.publish(broker, address, [f"v{n}" for n in range(12)])

    @needs("topic")
    async def test_more_members_than_partitions_lose_nothing(self, system: Harness) -> None:
        """G4: the ones without a partition wait, and take over when a member leaves."""
        topic = system.topic(partitions=2)
        seen: Counter[str] = Counter()
        async with system.connect() as broker:
            left = asyncio.Event()

            async def member(*, leaves: bool) -> None:
                async with system.connect() as own, system.subscribe(own, topic) as messages:
                    while not left.is_set():
                        got = await messages.receive(limit=10, timeout=system.quiet / 10)
                        for message in got:
                            await message.ack()
                            seen[message.id] += 1
                        if got and leaves:
                            return

            async with asyncio.TaskGroup() as tasks:
                for leaves in (True, True, False, False, False):
                    tasks.create_task(member(leaves=leaves))
                for number in range(80):
                    await system.publish(broker, topic, [f"v{number}"], key=f"k{number % 10}")
                    await asyncio.sleep(system.quiet / 50)
                await system.eventually(lambda: len(seen) == 80)
                left.set()
        assert sorted(seen) == sorted(f"v{n}" for n in range(80))

    @restarts
    async def test_what_a_group_has_done_survives_a_restart(self, system: Harness, kind: Kind) -> None:
        """G5: exactly the unsettled messages come again, also when every second one was acknowledged."""
        address = system.address(kind)
        async with system.connect() as broker:
            await system.publish(broker, address, [f"v{n}" for n in range(20)])
            async with system.subscribe(broker, address) as messages:
                taken = await system.take(messages, 20)
                for message in taken[::2]:
                    await message.ack(confirm=True)
        await system.restart()
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            again = await system.take(messages, 10)
            for message in again:
                await message.ack()
            again += await system.drain(messages)
        assert sorted(m.id for m in again) == sorted(m.id for m in taken[1::2])

    async def test_members_opened_and_closed_at_once_do_no_harm(self, system: Harness, kind: Kind) -> None:
        """G6: afterwards every fresh message reaches a new member, once."""
        address = system.address(kind)
        async with system.connect() as broker:
            await broker.declare(address)

            async def visit(number: int) -> None:
                async with system.connect() as own, system.subscribe(own, address):
                    await asyncio.sleep(number * 0.001)

            async with asyncio.TaskGroup() as tasks:
                for number in range(10):
                    tasks.create_task(visit(number))
            await system.publish(broker, address, [f"v{n}" for n in range(50)])
            async with system.subscribe(broker, address) as messages:
                got = await system.drain(messages)
        assert sorted(m.id for m in got) == sorted(f"v{n}" for n in range(50))

    @needs("topic")
    async def test_a_deleted_group_begins_anew(self, system: Harness) -> None:
        """G7: its position is forgotten; the other group's is not."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, ["a", "b"])
            for group in ("one", "two"):
                async with broker.subscribe(topic, group=group) as messages:
                    assert len(await system.drain(messages)) == 2
            await broker.delete(topic, "one")
            async with broker.subscribe(topic, group="one") as messages:
                assert sorted(m.value for m in await system.drain(messages)) == ["a", "b"]
            async with broker.subscribe(topic, group="two") as messages:
                await system.nothing(messages)

    @needs("topic")
    async def test_the_start_of_a_group_counts_only_the_first_time(self, system: Harness) -> None:
        """G7: a group that has a position goes on from it, whatever start says later."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, ["a"])
            async with broker.subscribe(topic, group="g", start=Start.LATEST) as messages:
                await system.nothing(messages)
            await system.publish(broker, topic, ["b"])
            async with broker.subscribe(topic, group="g", start=Start.EARLIEST) as messages:
                assert [m.value for m in await system.drain(messages)] == ["b"]

    @needs("queue.shared")
    async def test_a_slow_consumer_does_not_stall_the_others(self, system: Harness) -> None:
        """G8: while one sits on a message, all the others come to the next consumer."""
        queue = system.queue()
        async with system.connect() as slow, system.connect() as quick, system.subscribe(slow, queue) as held:
            await system.publish(slow, queue, ["held"])
            (message,) = await system.take(held, 1)
            held.prefetch = 1
            async with system.subscribe(quick, queue) as flowing:
                await system.publish(slow, queue, [f"v{n}" for n in range(24)])
                got = await system.drain(flowing)
                assert sorted(m.value for m in got) == sorted(f"v{n}" for n in range(24))
                await message.ack(confirm=True)

    @needs("queue", "not queue.shared")
    async def test_a_slow_consumer_stalls_no_more_than_its_own_part(self, system: Harness) -> None:
        """G8: where a queue is not shared, what waits behind the message that one sits on comes to that one, and all else goes on."""
        queue = system.queue()
        values = [f"v{n}" for n in range(40)]
        async with (
            system.connect() as slow,
            system.connect() as quick,
            system.subscribe(slow, queue, prefetch=1) as held,
            system.subscribe(quick, queue) as flowing,
        ):
            await asyncio.gather(system.nothing(held), system.nothing(flowing))  # who owns what is settled by then
            for value in values:
                await slow.publish(queue, value)
                await system.moments(5)
            (message,) = await system.take(held, 1)
            passed = [m.value for m in await system.drain(flowing)]
            await message.ack()
            own = [message.value, *(m.value for m in await system.drain(held))]
        assert passed, "a slow consumer stalls all of the queue"
        assert sorted(passed + own) == sorted(values)

    @needs("topic")
    async def test_a_slow_member_does_not_stall_the_keys_of_others(self, system: Harness) -> None:
        """G8: while one sits on a message, everything that is not its own goes on."""
        topic = system.topic()
        keys = [f"k{n}" for n in range(24)]
        async with (
            system.connect() as slow,
            system.connect() as quick,
            system.subscribe(slow, topic, prefetch=1) as held,
            system.subscribe(quick, topic) as flowing,
        ):
            for key in keys:  # who owns which key is only seen by what comes
                await system.publish(slow, topic, [f"first/{key}"], key=key)
            mine = asyncio.ensure_future(system.drain(held))
            owned = {m.key for m in await system.drain(flowing)}
            await mine
            assert 0 < len(owned) < len(keys), "both members take part"
            for key in keys:
                await system.publish(slow, topic, [f"second/{key}"], key=key)
            (message,) = await system.take(held, 1)
            assert {m.key for m in await system.drain(flowing)} == owned
            await message.ack()

    @needs("topic")
    async def test_what_runs_ends_before_its_partition_moves(self, system: Harness) -> None:
        """G3: a member that joins takes over nothing that another one is running."""
        topic = system.topic()
        values = [f"v{n}" for n in range(8)]
        runs: Counter[str] = Counter()

        async def handle(message: Message[str]) -> None:
            runs[message.value] += 1
            await asyncio.sleep(system.quiet / 2)

        async with system.connect() as broker, system.connect() as other:
            for value in values:
                await system.publish(broker, topic, [value], key=value)
            async with system.serve(broker, topic, handle, concurrency=8):
                await system.eventually(lambda: len(runs) == len(values))
                async with system.serve(other, topic, handle, concurrency=8):
                    await asyncio.sleep(2 * system.quiet)
        assert runs == Counter(values)

    @needs("topic")
    async def test_what_has_not_started_goes_to_the_member_that_joins(self, system: Harness) -> None:
        """G3: and runs there only, as if nobody had received it before."""
        topic = system.topic()
        values = [f"v{n}" for n in range(24)]
        runs: dict[str, list[str]] = {"first": [], "second": []}
        deliveries: set[int] = set()

        def handler(name: str) -> Callable[[Message[str]], Awaitable[None]]:
            async def handle(message: Message[str]) -> None:
                runs[name].append(message.value)
                deliveries.add(message.deliveries)
                await asyncio.sleep(system.quiet / 8)

            return handle

        async with system.connect() as broker, system.connect() as other:
            for value in values:
                await system.publish(broker, topic, [value], key=value)
            async with system.serve(broker, topic, handler("first"), prefetch=100):
                await system.eventually(lambda: len(runs["first"]) == 2)
                async with system.serve(other, topic, handler("second"), prefetch=100):
                    await system.eventually(lambda: set(runs["first"] + runs["second"]) == set(values))
                    await system.settle_down()
        assert runs["second"], "the second member took no part"
        assert Counter(runs["first"] + runs["second"]) == Counter(values)
        assert deliveries == {1}

    @needs("topic")
    async def test_a_latest_group_whose_first_member_dies_loses_nothing(self, system: Harness) -> None:
        """G5: its start is stored on entering, not with the first acknowledgement."""
        topic = system.topic()
        async with system.connect() as broker:
            await system.publish(broker, topic, ["old"])
            doomed = system.connect()
            async with doomed, doomed.subscribe(topic, group="g", start=Start.LATEST) as messages:
                await system.publish(broker, topic, [f"v{n}" for n in range(10)])
                assert await messages.receive(limit=3, timeout=system.deadline)
                await system.crash(doomed)
            await system.publish(broker, topic, ["after"])
            async with broker.subscribe(topic, group="g", start=Start.LATEST) as messages:
                got = await system.drain(messages, quiet=system.gone("topic"))
        assert sorted(m.value for m in got) == sorted([*(f"v{n}" for n in range(10)), "after"])
