"""CANCELLATION: at whatever moment it comes, nothing is lost and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextvars
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from ...address import Queue
from ...errors import BrokerError
from ...message import Message
from ._harness import Harness, Kind
from ._runner import Suite, needs, seeds

VALUES = ("a", "b", "c", "d")


class Sweep:
    """Runs a coroutine and cancels its task at the *at*-th point where it waits.

    *late* cancels when what it waits for has just become ready: the moment at which a result can fall between two chairs.
    """

    def __init__(self, at: int, *, late: bool) -> None:
        self.points = 0
        self._at = at
        self._late = late

    async def run(self, main: Coroutine[Any, Any, None]) -> bool:
        """Return whether *main* had that many points."""
        task = asyncio.ensure_future(self._counted(main))
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        return self.points >= self._at

    async def _counted(self, main: Coroutine[Any, Any, None]) -> None:
        await self._steps(main)

    @types.coroutine
    def _steps(self, main: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        result: Any = None
        error: BaseException | None = None
        while True:
            try:
                waits_for = main.send(result) if error is None else main.throw(error)
            except StopIteration:
                return
            self.points += 1
            if self.points == self._at:
                task = asyncio.current_task()
                assert task is not None
                if self._late and isinstance(waits_for, asyncio.Future):
                    waits_for.add_done_callback(lambda _, task=task: task.cancel())  # type: ignore[misc]
                else:
                    task.cancel()
            result, error = None, None
            try:
                result = yield waits_for
            except BaseException as exc:
                error = exc


@contextmanager
def _tasks() -> Iterator[weakref.WeakSet[asyncio.Future[Any]]]:
    """Collect the tasks that are begun on behalf of what is begun inside: not those by which brokers of before live on."""
    loop, begun = asyncio.get_running_loop(), weakref.WeakSet[asyncio.Future[Any]]()
    factory = loop.get_task_factory()

    def begin(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        made: Any = asyncio.Task(coro, loop=loop, **options) if factory is None else factory(loop, coro, **options)
        if _inside.get():
            begun.add(made)
        return made

    loop.set_task_factory(begin)
    token = _inside.set(True)
    try:
        yield begun
    finally:
        _inside.reset(token)
        loop.set_task_factory(factory)


_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("_inside", default=False)
Step = Callable[[int], Coroutine[Any, Any, None]]


async def every_point(prepare: Step, scenario: Step, check: Step) -> int:
    """Cancel *scenario* at each of its points in turn, prepare and check each round; return how many there were.

    Each gets the number of the round.
    """
    number = 0
    for late in (False, True):
        at = 0
        while True:
            at += 1
            number += 1
            await prepare(number)
            with _tasks() as begun:
                reached = await Sweep(at, late=late).run(scenario(number))
            left = {task for task in begun if not task.done()}
            assert not left, f"cancelled at point {at} (late={late}), it left tasks: {left}"
            try:
                await check(number)
            except Exception as error:
                error.add_note(f"cancelled at point {at}, late={late}")
                raise
            if not reached:
                break
            assert at < 2000, "the scenario has no end"
    return number


class Cancelling(Suite):
    async def test_a_cancelled_receive_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """C1: the next receive gets the message, and only that one."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            seen: list[str] = []
            for number in range(30):
                receiving = asyncio.ensure_future(messages.receive(timeout=system.deadline))
                publishing = asyncio.ensure_future(system.publish(broker, address, [f"v{number}"]))
                for _ in range(number):
                    await asyncio.sleep(0)
                receiving.cancel()
                await asyncio.wait([receiving, publishing])
                publishing.result()
                if not receiving.cancelled():
                    for message in receiving.result():
                        seen.append(message.value)
                        await message.ack()
            seen += [m.value for m in await system.drain(messages)]
            assert sorted(seen) == sorted(f"v{n}" for n in range(30))

    async def test_two_readers_of_a_subscription_lose_nothing_when_one_is_cancelled(
        self, system: Harness, kind: Kind
    ) -> None:
        """C1: a wake-up that was meant for the cancelled one reaches the other."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            for number in range(12):
                readers = [asyncio.ensure_future(messages.receive(timeout=system.deadline)) for _ in range(2)]
                await asyncio.sleep(0)
                publishing = asyncio.ensure_future(system.publish(broker, address, [f"v{number}"]))
                for _ in range(number):
                    await asyncio.sleep(0)
                readers[number % 2].cancel()
                await publishing
                done, waiting = await asyncio.wait(readers, return_when=asyncio.ALL_COMPLETED, timeout=system.quiet)
                got = [m for reader in done if not reader.cancelled() for m in reader.result()]
                assert [m.value for m in got] == [f"v{number}"]
                await got[0].ack()
                for reader in waiting:
                    reader.cancel()
                if waiting:
                    await asyncio.wait(waiting)

    async def test_a_cancelled_process_block_hands_its_message_back(self, system: Harness, kind: Kind) -> None:
        """C2: by hand too, and the cancellation goes on."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await system.publish(broker, address, ["v"])
            (message,) = await system.take(messages, 1)

            begun = asyncio.Event()

            async def work() -> None:
                async with message.process():
                    begun.set()
                    await asyncio.sleep(system.deadline)

            task = asyncio.ensure_future(work())
            await begun.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            (again,) = await system.take(messages, 1, within=system.quiet)
            assert (again.attempt, again.deliveries) == (1, 1)
            await again.ack()

    @seeds(1)
    async def test_cancelling_a_reader_at_every_point_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """C3: connect, subscribe, receive, acknowledge, leave: cancelled at each await in turn."""
        done: list[str] = []
        unsure: set[str] = set()

        async with system.connect() as steady:

            async def prepare(number: int) -> None:
                done.clear()
                unsure.clear()
                await system.publish(steady, system.address(kind, f"a{number}"), VALUES)

            async def scenario(number: int) -> None:
                address = system.address(kind, f"a{number}")
                async with system.connect() as broker, system.subscribe(broker, address, prefetch=3) as messages:
                    while len(done) < len(VALUES):
                        for message in await messages.receive(limit=2, timeout=system.quiet):
                            unsure.add(message.value)
                            await message.ack(confirm=len(done) % 2 == 0)
                            unsure.remove(message.value)
                            done.append(message.value)

            async def check(number: int) -> None:
                async with system.subscribe(steady, system.address(kind, f"a{number}")) as messages:
                    rest = await system.drain(messages)
                again = [m.value for m in rest]
                assert len(again) == len(set(again)), "delivered twice"
                assert not set(again) & set(done), "acknowledged, and delivered again"
                assert {*again, *done, *unsure} == set(VALUES), "lost"
                assert {m.attempt for m in rest} <= {1}
                assert {m.deliveries for m in rest} <= {1}

            assert await every_point(prepare, scenario, check) > 4

    @seeds(1)
    async def test_cancelling_a_publisher_at_every_point_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """C3: in the middle of an outage; what was confirmed is stored once, what was not at most once."""
        confirmed: list[str] = []
        mended: list[asyncio.Task[None]] = []

        async with system.connect() as steady, system.connect() as broker:

            async def mend() -> None:
                await asyncio.sleep(system.quiet / 10)
                await system.reconnect(broker)

            async def prepare(number: int) -> None:
                confirmed.clear()
                for process in (steady, broker):
                    await process.declare(system.address(kind, f"a{number}"))
                await system.disconnect(broker)
                mended[:] = [asyncio.ensure_future(mend())]

            async def scenario(number: int) -> None:
                address = system.address(kind, f"a{number}")
                for value in VALUES[:2]:
                    await broker.publish(address, value)
                    confirmed.append(value)
                await broker.publish_many(address, VALUES[2:])
                confirmed.extend(VALUES[2:])

            async def check(number: int) -> None:
                await mended[0]
                assert (await broker.publish(system.address(kind, f"a{number}"), "after")).id
                async with system.subscribe(steady, system.address(kind, f"a{number}")) as messages:
                    stored = [m.value for m in await system.drain(messages)]
                assert len(stored) == len(set(stored)), "stored twice"
                assert {*confirmed, "after"} <= set(stored) <= {*VALUES, "after"}, "confirmed and lost"

            assert await every_point(prepare, scenario, check) > 2

    @seeds(1)
    async def test_cancelling_a_service_at_every_point_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """C3: entering, running and leaving: every message is handled once in the end, and no attempt is burnt."""
        finished: list[str] = []
        attempts: set[int] = set()

        async def handler(message: Message[str]) -> None:
            attempts.add(message.attempt)
            await asyncio.sleep(0.01)
            finished.append(message.value)

        async with system.connect() as steady:

            async def prepare(number: int) -> None:
                finished.clear()
                await system.publish(steady, system.address(kind, f"a{number}"), VALUES)

            async def scenario(number: int) -> None:
                address = system.address(kind, f"a{number}")
                async with system.connect() as broker, system.serve(broker, address, handler):
                    for _ in range(5):
                        await asyncio.sleep(0.005)

            async def check(number: int) -> None:
                async with system.serve(steady, system.address(kind, f"a{number}"), handler):
                    await system.eventually(lambda: len(finished) >= len(VALUES))
                    await system.settle_down()
                assert sorted(finished) == list(VALUES)

            assert await every_point(prepare, scenario, check) > 4
            assert attempts == {1}

    @seeds(1)
    async def test_cancelling_a_redrive_at_every_point_loses_nothing(self, system: Harness, kind: Kind) -> None:
        """C3: each letter is here or there, and not in both."""
        async with system.connect() as steady:

            async def prepare(number: int) -> None:
                address = system.address(kind, f"a{number}")
                await system.publish(steady, address, VALUES)
                async with system.subscribe(steady, address) as messages:
                    for message in await system.take(messages, len(VALUES)):
                        await message.reject("no")

            async def scenario(number: int) -> None:
                await steady.redrive(system.letters(system.address(kind, f"a{number}")))

            async def check(number: int) -> None:
                address = system.address(kind, f"a{number}")
                letters = [letter.id for letter in await system.browse(steady, system.letters(address))]
                async with system.subscribe(steady, address) as messages:
                    alive = [m.id for m in await system.drain(messages)]
                assert sorted(letters + alive) == list(VALUES)

            await every_point(prepare, scenario, check)

    @needs("queue")
    @seeds(1)
    async def test_cancelling_a_request_at_every_point_leaves_the_broker_usable(self, system: Harness) -> None:
        """C3: the next request gets its own answer."""
        quotes = Queue("quotes", int, reply=int, lease=system.lease)

        async def double(message: Message[int]) -> int:
            return 2 * message.value

        async with system.connect() as server, system.connect() as client, system.serve(server, quotes, double):
            await client.request(quotes, 0, timeout=system.deadline)  # the inbox is open, and stays so

            async def prepare(number: int) -> None:
                pass

            async def scenario(number: int) -> None:
                assert await client.request(quotes, number, timeout=system.deadline) == 2 * number

            async def check(number: int) -> None:
                assert await client.request(quotes, -number, timeout=system.deadline) == -2 * number

            assert await every_point(prepare, scenario, check) > 2

    async def test_an_anyio_deadline_and_an_asyncio_timeout_do_the_same(self, system: Harness, kind: Kind) -> None:
        """C4: both end a receive and a publish; what was waiting comes afterwards."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            began = system.now()
            with anyio.move_on_after(system.quiet) as scope:
                await messages.receive()
            assert scope.cancelled_caught
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(system.quiet):
                    await messages.receive()
            assert system.now() - began >= 2 * system.quiet
            with anyio.move_on_after(0):
                await broker.publish(address, "maybe", id="maybe")
            await system.publish(broker, address, ["after"])
            ids = [m.id for m in await system.drain(messages)]
            assert ids.count("after") == 1
            assert ids.count("maybe") <= 1

    async def test_a_subscription_survives_the_cancellation_of_its_reader(self, system: Harness, kind: Kind) -> None:
        """C1: the task that waits is cancelled, the subscription goes on for the next one."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:

            async def read() -> None:
                async for message in messages:
                    await message.ack()

            task = asyncio.ensure_future(read())
            await system.settle_down()
            task.cancel()
            await asyncio.wait([task])
            await system.publish(broker, address, ["v"])
            (message,) = await system.take(messages, 1)
            await message.ack(confirm=True)
            with pytest.raises(BrokerError):
                await message.nack()
