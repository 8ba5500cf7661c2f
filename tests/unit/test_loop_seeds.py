"""The seeded order of the virtual loop: tasks that are ready change places, and all that asyncio promises still holds."""

from __future__ import annotations

import asyncio
import random

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerkit import Message, Queue, RetryPolicy, Service
from brokerkit.testing import idle, run, running


async def _turns(count: int = 6, rounds: int = 3) -> list[int]:
    """Return the order in which *count* tasks take *rounds* turns."""
    order: list[int] = []

    async def take(number: int) -> None:
        for _ in range(rounds):
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(take(number))
    return order


def test_without_a_seed_tasks_keep_their_order() -> None:
    assert run(_turns) == [0, 1, 2, 3, 4, 5] * 3


def test_a_seed_gives_one_order_and_other_seeds_give_others() -> None:
    orders = {tuple(run(_turns, seed=seed)) for seed in range(20)}
    assert len(orders) > 15
    assert all(run(_turns, seed=seed) == run(_turns, seed=seed) for seed in range(5))


def test_every_ready_task_takes_one_step_before_one_takes_two() -> None:
    for seed in range(20):
        order = run(_turns, seed=seed)
        assert [sorted(order[at : at + 6]) for at in (0, 6, 12)] == [[0, 1, 2, 3, 4, 5]] * 3


def test_tasks_woken_by_one_event_change_places() -> None:
    async def main() -> tuple[int, ...]:
        event = asyncio.Event()
        order: list[int] = []

        async def wait(number: int) -> None:
            await event.wait()
            order.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(wait(number))
                await asyncio.sleep(1)  # they wait in this order
            event.set()
        return tuple(order)

    async def with_tasks_written_in_python() -> tuple[int, ...]:
        made = getattr(asyncio.tasks, "_PyTask")  # noqa: B009
        asyncio.get_running_loop().set_task_factory(lambda loop, coro, **options: made(coro, loop=loop, **options))
        return await asyncio.create_task(main())

    assert run(main) == run(with_tasks_written_in_python) == (0, 1, 2, 3)
    assert len({run(main, seed=seed) for seed in range(20)}) > 5
    assert len({run(with_tasks_written_in_python, seed=seed) for seed in range(20)}) > 5


def test_first_steps_of_tasks_written_in_python_change_places_too() -> None:
    made = getattr(asyncio.tasks, "_PyTask")  # noqa: B009

    async def main() -> tuple[int, ...]:
        asyncio.get_running_loop().set_task_factory(lambda loop, coro, **options: made(coro, loop=loop, **options))
        return tuple(await _turns(4, 2))

    assert len({run(main, seed=seed) for seed in range(20)}) > 5


@settings(max_examples=100, deadline=None)
@given(kinds=st.lists(st.sampled_from("css"), max_size=12), seed=st.integers(0, 5))
def test_a_plain_callback_never_moves_and_no_step_moves_past_it(kinds: list[str], seed: int) -> None:
    ran: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []

        async def step(number: int) -> None:
            ran.append(number)

        for number, kind in enumerate(kinds):
            if kind == "s":
                tasks.append(loop.create_task(step(number)))
            else:
                loop.call_soon(ran.append, number)
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)

    run(main, seed=seed)
    begin = 0
    for number, kind in enumerate([*kinds, "c"]):
        if kind == "c":
            assert sorted(ran[begin:number]) == list(range(begin, number))
            assert number == len(kinds) or ran[number] == number
            begin = number + 1


def test_the_callbacks_of_one_future_keep_their_order() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        future = asyncio.get_running_loop().create_future()
        for number in range(10):
            future.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        future.set_result(None)
        await asyncio.sleep(0)
        return order

    assert all(run(main, seed=seed) == list(range(10)) for seed in range(20))


def test_a_scheduled_cancel_counts_as_a_callback_not_as_a_step() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(4)]
        # Each has begun and its second step is in the queue before the cancel is.
        loop.call_soon(lambda: loop.call_soon(tasks[0].cancel))
        await asyncio.wait(tasks)
        assert not tasks[0].cancelled()

    for seed in range(20):
        run(main, seed=seed)


def test_the_locks_and_queues_of_asyncio_hold_under_every_seed() -> None:
    async def main() -> None:
        lock, semaphore, queue = asyncio.Lock(), asyncio.Semaphore(2), asyncio.Queue[int](3)
        inside, most, got = 0, 0, list[int]()

        async def work(number: int) -> None:
            nonlocal inside, most
            async with lock:
                inside += 1
                assert inside == 1
                await asyncio.sleep(0)
                inside -= 1
            async with semaphore:
                most += 1
                assert most <= 2
                await asyncio.sleep(0.1)
                most -= 1
            await queue.put(number)

        async def read() -> None:
            while True:
                got.append(await queue.get())
                queue.task_done()

        readers = [asyncio.create_task(read()) for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(work(number))
        await queue.join()
        for reader in readers:
            reader.cancel()
        assert sorted(got) == list(range(20))

    for seed in range(30):
        run(main, seed=seed)


def test_the_task_groups_scopes_and_streams_of_anyio_hold_under_every_seed() -> None:
    async def main() -> None:
        send, receive = anyio.create_memory_object_stream[int](2)
        lock, limiter, got, cleaned = anyio.Lock(), anyio.CapacityLimiter(2), list[int](), list[str]()

        async def produce(number: int, stream: MemoryObjectSendStream[int]) -> None:
            async with stream:
                async with lock, limiter:
                    await anyio.sleep(random.Random(number).random())
                await stream.send(number)

        async def consume(stream: MemoryObjectReceiveStream[int]) -> None:
            async with stream:
                async for number in stream:
                    got.append(number)

        async def sleep() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)
                    cleaned.append("slept")

        with anyio.move_on_after(100) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(sleep)
                async with anyio.create_task_group() as inner:
                    for number in range(10):
                        inner.start_soon(produce, number, send.clone())
                    for _ in range(3):
                        inner.start_soon(consume, receive.clone())
                    send.close()
                receive.close()
        assert scope.cancelled_caught
        assert sorted(got) == list(range(10))
        assert cleaned == ["slept"]
        assert anyio.current_time() == 101.0

    for seed in range(30):
        run(main, seed=seed)


def test_a_race_that_the_usual_order_hides_shows_under_some_seed() -> None:
    async def main() -> bool:
        total = 0

        async def add() -> None:
            nonlocal total
            seen = total
            await asyncio.sleep(0)
            total = seen + 1

        async def late() -> None:
            await asyncio.sleep(0)
            await add()

        # In the usual order each second step comes before the next first step.
        first = asyncio.create_task(add())
        second = asyncio.create_task(late())
        await asyncio.gather(first, second)
        return total == 2

    assert run(main)
    assert {run(main, seed=seed) for seed in range(20)} == {True, False}


def test_a_seed_fixes_the_jitter_of_retries() -> None:
    queue = Queue("emails", str)
    service = Service("work")

    @service.subscribe(queue, retry=RetryPolicy(attempts=4))
    async def fail(message: Message[str]) -> None:
        if message.attempt < 4:
            raise ValueError("again")

    async def main() -> float:
        async with running(service) as broker:
            await broker.publish(queue, "a")
            await idle(broker)
            return asyncio.get_running_loop().time()

    took = {seed: run(main, seed=seed) for seed in range(5)}
    assert len(set(took.values())) == 5
    assert took == {seed: run(main, seed=seed) for seed in range(5)}
