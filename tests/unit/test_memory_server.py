"""Memory servers: who may use them, what outlives a connection, what is declared and deleted."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from brokerkit.address import AnyQueue, AnyTopic, Queue, Topic, redrive_queue
from brokerkit.driver import Backlog, Delivery, Driver, Record, Settlement, Source
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.errors import (
    BufferFull,
    CapabilityError,
    Closed,
    ConfigError,
    NotFound,
    SettingsMismatch,
)
from brokerkit.policy import Start

from .memory_driver import (
    at_once,
    consuming,
    driver,
    ids,
    names,
    opened,
    put,
    rest,
    results,
    run,
    turns,
)

LEASE = 30.0
SESSION = 10.0
JOBS: AnyQueue = Queue("jobs", bytes, lease=LEASE)
ORDERS: AnyTopic = Topic("orders", bytes, partitions=4)


def keeps_the_contract(made: MemoryDriver) -> Driver:
    """A type checker says whether it does."""
    return made


# ---------------------------------------------------------------------- connections


def test_a_server_without_a_name_is_private_and_one_with_a_name_is_shared_and_kept() -> None:
    async def private() -> None:
        async with opened(JOBS) as one, opened() as two:
            assert await one.describe(JOBS) == {"priorities": 1, "dedup": 0.0, "lease": 30.0}
            assert await two.describe(JOBS) is None

    async def publish() -> None:
        async with opened(JOBS, url="memory://kept") as made:
            await put(made, JOBS, ["now"])
            await put(made, JOBS, ["later"], delay=100)

    async def read() -> None:
        async with opened(url="memory://kept") as one, opened(url="memory://kept") as two:
            assert (await two.describe(JOBS) or {})["lease"] == 30.0
            async with consuming(one, JOBS) as consumer:
                assert ids(await rest(consumer)) == ["now"]
                assert ids(await consumer.receive(1, 101)) == ["later"], "its loop is gone, its time is not"

    run(private)
    run(publish)
    run(read)


def test_the_time_between_two_loops_has_passed() -> None:
    class Later:
        """A loop's clock that is a day ahead."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.monotonic = loop.time

        def time(self) -> float:
            return 1893456000.0 + 86400 + self.monotonic()

    async def publish() -> None:
        async with opened(JOBS, url="memory://day") as made:
            await put(made, JOBS, ["due"], delay=86400)
            await put(made, JOBS, ["dead"], ttl=86399)
            await put(made, JOBS, ["late"], delay=86500)

    async def read() -> None:
        loop: Any = asyncio.get_running_loop()
        loop.clock = Later(loop)
        async with opened(url="memory://day") as made, consuming(made, JOBS) as consumer:
            assert ids(await consumer.receive(10, 1)) == ["due"]
            assert ids(await consumer.receive(10, 1000)) == ["late"]
            assert loop.time() == pytest.approx(100)

    run(publish)
    run(read)


def test_a_loop_that_ended_without_closing_is_like_a_process_that_was_killed() -> None:
    async def die() -> None:
        made = driver("memory://abandoned")
        await made.__aenter__()
        await made.declare(JOBS)
        await made.declare(ORDERS)
        await put(made, JOBS, ["job"])
        await put(made, ORDERS, ["order"])
        for address in (JOBS, ORDERS):
            consumer: Any = made.consume(
                Source(address, "g" if address == ORDERS else None), prefetch=9, revoked=_ignore
            )
            consumer._link.consumers[consumer] = None
            consumer._entered = True
            consumer._join()
            consumer.check()
            assert len(await consumer.receive(1, 1)) == 1

    async def read() -> None:
        async with opened(url="memory://abandoned") as made:
            async with consuming(made, JOBS) as jobs, consuming(made, ORDERS, "g") as orders:
                loop = asyncio.get_running_loop()
                (order,) = await orders.receive(1, 100)
                assert (order.deliveries, round(loop.time(), 6)) == (2, SESSION)
                (job,) = await jobs.receive(1, 100)
                assert (job.deliveries, round(loop.time(), 6)) == (2, LEASE)

    run(die)
    run(read)


async def _ignore(deliveries: object) -> None: ...


def test_one_event_loop_after_the_other_is_fine() -> None:
    async def use(id: str) -> list[str]:
        async with opened(JOBS, url="memory://turns") as made:
            await put(made, JOBS, [id])
            return ids(await made.browse(JOBS, limit=9))

    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        assert loops[0].run_until_complete(use("a")) == ["a"]
        assert loops[1].run_until_complete(use("b")) == ["a", "b"]
        assert loops[0].run_until_complete(use("c")) == ["a", "b", "c"]
    finally:
        for loop in loops:
            loop.close()


def test_two_event_loops_at_once_are_refused() -> None:
    errors: list[BaseException] = []

    def elsewhere(use: Callable[[], Any]) -> None:
        def thread() -> None:
            try:
                asyncio.run(use())
            except BaseException as error:
                errors.append(error)

        worker = threading.Thread(target=thread)
        worker.start()
        worker.join(10)

    async def main() -> None:
        async with opened(JOBS, url="memory://two") as made, consuming(made, JOBS) as consumer:
            record = Record(JOBS, "a", b"")

            async def second() -> None:
                async with driver("memory://two"):
                    raise AssertionError("two loops share one server")

            calls: list[Callable[[], Any]] = [
                second,
                lambda: made.publish([record], timeout=1),
                lambda: made.publish([record, record], timeout=1),
                lambda: consumer.receive(1, 0),
                lambda: consumer.settle([Settlement(Delivery(record, None, "jobs@1"))]),
                lambda: consumer.release([]),
                lambda: made.declare(JOBS),
                lambda: made.backlog(Source(JOBS)),
            ]
            for call in calls:
                elsewhere(call)
            assert [type(error) for error in errors] == [ConfigError] * len(calls), errors
            assert all("event loop" in str(error) for error in errors)
            await put(made, JOBS, ["a"])

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_a_fork_is_refused() -> None:
    async def main() -> list[str]:
        async with opened(JOBS, url="memory://forked") as made:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:  # the inherited loop goes on in the child: only what is asked of the driver counts
                try:
                    texts = [refusal(lambda: made.publish([Record(JOBS, "a", b"")], timeout=1))]
                    texts.append(refusal(lambda: made.declare(JOBS)))
                    asyncio._set_running_loop(None)
                    texts.append(refusal(lambda: _enter("memory://forked"), asyncio.run))
                    os.write(write, "\n".join(texts).encode())
                finally:
                    os._exit(0)
            os.close(write)
            os.waitpid(child, 0)
            with os.fdopen(read) as pipe:
                told = pipe.read().split("\n")
            await put(made, JOBS, ["a"])
            return told

    for text in asyncio.run(main()):
        assert text.startswith("ConfigError: "), text
        assert "fork" in text


def refusal(call: Callable[[], Any], run: Callable[[Any], Any] = at_once) -> str:
    """Return what *call* is refused with."""
    try:
        run(call())
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


async def _enter(url: str) -> None:
    async with driver(url):
        pass


def test_a_connection_that_is_not_open_says_so() -> None:
    async def main() -> None:
        made = driver()
        record = Record(JOBS, "a", b"")
        with pytest.raises(Closed, match="not open yet"):
            await made.publish([record], timeout=1)
        assert not (await made.health()).ok
        async with made:
            await made.declare(JOBS)
            with pytest.raises(ConfigError, match="open already"):
                await made.__aenter__()
            context = consuming(made, JOBS)
            consumer = await context.__aenter__()
            waiting = asyncio.ensure_future(consumer.receive(1, 100))
            await turns()
        with pytest.raises(Closed):
            await waiting
        await context.__aexit__(None, None, None)
        for call in (
            made.publish([record], timeout=1),
            made.describe(JOBS),
            made.browse(JOBS, limit=1),
            consumer.receive(1, 1),
            consumer.settle([]),
        ):
            with pytest.raises(Closed):
                await call
        with pytest.raises(Closed):
            async with consuming(made, JOBS):
                pass

    run(main)


def test_a_consumer_that_was_left_says_so() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            async with consuming(made, JOBS) as consumer:
                waiting = asyncio.ensure_future(consumer.receive(1, 100))
                await turns()
                with pytest.raises(ConfigError, match="one task at a time"):
                    await consumer.receive(1, 100)
            with pytest.raises(Closed):
                await waiting
            with pytest.raises(Closed):
                await consumer.receive(1, 0)

    run(main)


def test_what_a_body_raises_comes_out_as_it_is() -> None:
    async def main() -> None:
        async with opened(JOBS) as made:
            for error in (LookupError("mine"), asyncio.CancelledError(), KeyboardInterrupt()):
                with pytest.raises(type(error)) as caught:
                    async with consuming(made, JOBS):
                        raise error
                assert caught.value is error

    run(main)


def test_connections_must_agree_on_the_size_of_a_server() -> None:
    async def main() -> None:
        async with opened(url="memory://sized", max_messages=5):
            with pytest.raises(ConfigError, match="made with max_messages=5, not 6"):
                await driver("memory://sized?max_messages=6").__aenter__()
            async with opened(url="memory://sized") as made:
                await made.declare(JOBS)
                assert await results(made, JOBS, names(6)) == [None] * 5 + [BufferFull]
            async with opened(url="memory://sized?max_messages=5"):
                pass

    run(main)


def test_a_name_is_one_kind_of_address() -> None:
    queue: AnyQueue = Queue("orders", bytes)

    async def main() -> None:
        async with opened(ORDERS) as made:
            for call in (
                made.declare(queue),
                made.describe(queue),
                made.browse(queue, limit=1),
                made.backlog(Source(queue)),
                made.purge(queue),
            ):
                with pytest.raises(SettingsMismatch, match="that name is a topic"):
                    await call
            assert await results(made, queue, ["a"]) == [SettingsMismatch]
            await made.declare(JOBS)
            with pytest.raises(SettingsMismatch, match="that name is a queue"):
                await made.declare(Topic("jobs", bytes))

    run(main)


def test_declaring_again_alters_nothing() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made:
            await put(made, JOBS, ["a"])
            await made.declare(Queue("jobs", bytes, lease=5, priorities=3))
            await made.declare(Topic("orders", bytes, partitions=9, retention=None))
            assert await made.describe(JOBS) == {"priorities": 1, "dedup": 0.0, "lease": 30.0}
            assert await made.describe(ORDERS) == {"partitions": 4, "retention": 7 * 86400.0}
            assert await made.describe(JOBS.dead_letters) == {}
            assert await made.describe(ORDERS.dead_letters("g")) is None
            assert await made.browse(ORDERS.dead_letters("g"), limit=1) == []
            await made.declare(ORDERS.dead_letters("h"))
            assert await made.describe(ORDERS.dead_letters("h")) == {}
            foreign = Topic("elsewhere", bytes).dead_letters("h")
            await made.declare(foreign)
            assert await made.browse(foreign, limit=1) == []

    run(main)


def test_deleting_takes_what_was_derived_and_nothing_else() -> None:
    other: AnyTopic = Topic("orders-eu", bytes)

    async def main() -> None:
        async with opened(ORDERS, other, JOBS) as made:
            letters = [address.dead_letters(group) for address in (ORDERS, other) for group in ("a", "b")]
            for letter in letters:
                await put(made, letter, ["x"])
            for group in ("a", "b"):
                await made.declare(redrive_queue(ORDERS, group))
            await made.delete(ORDERS, "a")
            assert [await made.describe(letter) for letter in letters] == [None, {}, {}, {}]
            assert await made.describe(redrive_queue(ORDERS, "a")) is None
            assert await made.describe(redrive_queue(ORDERS, "b")) is not None
            await made.delete(ORDERS)
            assert [await made.describe(letter) for letter in letters] == [None, None, {}, {}]
            assert await made.describe(redrive_queue(ORDERS, "b")) is None
            await made.delete(JOBS.dead_letters)
            assert await made.describe(JOBS.dead_letters) is None
            assert await made.describe(JOBS) is not None
            await made.delete(JOBS)
            with pytest.raises(NotFound):
                await made.browse(JOBS.dead_letters, limit=1)
            await made.delete(JOBS)
            await made.delete(ORDERS)
            await made.delete(ORDERS, "a")
            assert await results(made, JOBS, ["a"]) == [NotFound], "what was looked up before is forgotten"

    run(main)


def test_what_has_no_meaning_is_refused() -> None:
    async def main() -> None:
        async with opened(JOBS, ORDERS) as made:
            for consume in (Source(JOBS.dead_letters), Source(JOBS, until_end=True)):
                with pytest.raises(CapabilityError):
                    async with made.consume(consume, prefetch=1, revoked=_ignore):
                        pass
            topic: Any = ORDERS
            for call in (made.purge(topic), made.migrate(JOBS), made.browse(JOBS, limit=1, start=Start.LATEST)):
                with pytest.raises(CapabilityError):
                    await call
            for wrong in ("x", "jobs@", "jobs@1x", "other@1", "jobs@-1", "jobs@\u0661"):
                with pytest.raises(ConfigError, match="no position"):
                    await made.browse(JOBS, limit=1, after=wrong)
            assert await made.backlog(Source(ORDERS)) == Backlog()

    run(main)


def test_letters_are_paged_moved_and_purged() -> None:
    async def main() -> None:
        async with opened(JOBS, max_messages=150) as made, consuming(made, JOBS) as consumer:
            dead = JOBS.dead_letters
            receipts = await put(made, dead, names(300))
            assert receipts[4].position == "jobs..dead@5"
            page = await made.browse(dead, limit=100, after=receipts[9].position)
            assert ids(page) == [f"m{n}" for n in range(10, 110)]
            moved = await made.redrive(dead, [letter.position for letter in page] * 2, JOBS)
            assert [type(result) for result in moved] == [type(None)] * 100 + [NotFound] * 100
            moved = await made.redrive(dead, [letter.position for letter in await made.browse(dead, limit=60)], JOBS)
            assert [type(result) for result in moved] == [type(None)] * 50 + [BufferFull] * 10
            assert len(await rest(consumer)) == 150
            left = await made.browse(dead, limit=1000)
            assert len(left) == 150
            assert ids(await made.browse(dead, limit=1, after=receipts[55].position)) == [left[0].record.id]
            backlog = await made.backlog(Source(dead))
            assert (backlog.waiting, (await made.backlog(Source(JOBS))).dead) == (150, 150)
            assert await made.purge(dead) == 150
            assert (await made.backlog(Source(dead))).oldest_age is None
            assert (await put(made, dead, ["x"]))[0].position == "jobs..dead@301"

    run(main)
