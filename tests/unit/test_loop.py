"""The virtual loop: time that jumps and never lies, threads that hold it, deadlocks that are named."""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerkit import clock
from brokerkit.testing import Deadlock, VirtualLoop, now, run, virtual_loop
from brokerkit.testing._loop import EPOCH, PATIENCE

DAY = 86400.0


@pytest.fixture(autouse=True)
def quick() -> Generator[None]:
    """No test here may take long: time that does not jump shows as a failure."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


def test_a_year_passes_at_once_and_to_the_second() -> None:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await asyncio.sleep(365 * DAY)
        return begin, loop.time()

    assert run(main) == (0.0, 365 * DAY)


def test_the_clock_of_the_loop_moves_with_it() -> None:
    async def main() -> None:
        mine = clock.current()
        assert mine is asyncio.get_running_loop().clock  # type: ignore[attr-defined]
        assert (mine.time(), mine.monotonic()) == (EPOCH, 0.0)
        assert now() == datetime(2030, 1, 1, tzinfo=UTC)
        await asyncio.sleep(90)
        assert (mine.time(), mine.monotonic()) == (EPOCH + 90, 90.0)
        assert now() == datetime(2030, 1, 1, 0, 1, 30, tzinfo=UTC)

    run(main)


def test_in_a_usual_loop_the_time_is_the_systems() -> None:
    async def main() -> datetime:
        assert clock.current() is clock.SYSTEM
        return now()

    assert abs(asyncio.run(main()) - datetime.now(UTC)) < timedelta(minutes=1)


@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(0, 399 * DAY),
    delays=st.lists(st.floats(0, 1000) | st.floats(0, 1e-6) | st.integers(0, 3).map(float), min_size=1, max_size=20),
)
def test_timers_run_in_order_and_none_is_early(start: float, delays: list[float]) -> None:
    ran: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(start)
        done = loop.create_future()

        def expired(due: float) -> None:
            assert loop.time() >= due
            assert loop.time() <= due + 1e-7
            ran.append(due)
            if len(ran) == len(delays):
                done.set_result(None)

        for delay in delays:
            due = loop.time() + delay
            loop.call_at(due, expired, due)
        await done

    run(main)
    assert ran == sorted(ran)


def test_timeouts_of_asyncio_and_of_anyio_pass_at_once() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 1000)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await asyncio.Event().wait()
        with anyio.move_on_after(1000) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError), anyio.fail_after(1000):
            await anyio.Event().wait()
        return anyio.current_time()

    assert run(main) == 4000.0


# --- threads ---------------------------------------------------------------------------------------------------------


def test_time_stands_still_while_an_executor_works() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(20):
            assert await asyncio.wait_for(loop.run_in_executor(None, _work, 5), 0.000001) == 5
        assert loop.time() == 0.0
        await asyncio.sleep(10)
        assert loop.time() == 10.0

    run(main)


def test_time_stands_still_while_a_thread_of_anyio_works() -> None:
    async def main() -> None:
        for _ in range(20):
            with anyio.fail_after(0.000001):
                assert await anyio.to_thread.run_sync(_work, 5) == 5
        assert anyio.current_time() == 0.0
        await anyio.sleep(10)
        assert anyio.current_time() == 10.0

    run(main)


def test_time_stands_still_while_a_name_is_resolved() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await asyncio.wait_for(loop.getaddrinfo("127.0.0.1", 1), 0.000001)
        assert loop.time() == 0.0

    run(main)


def test_a_thread_that_waits_for_a_timer_of_the_loop_gets_it() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()

        def work() -> None:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()

        await loop.run_in_executor(None, work)
        return loop.time()

    began = time.monotonic()
    passed = run(main)
    assert 0.05 <= passed <= time.monotonic() - began


def test_time_passes_at_its_real_speed_beside_a_thread_that_does_not_end() -> None:
    stop = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, stop.wait)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.shield(future)
        assert time.monotonic() - began >= PATIENCE
        assert 0.1 <= loop.time() <= time.monotonic() - began
        stop.set()
        assert await future

    run(main)


def test_no_more_time_passes_beside_a_slow_thread_than_it_takes() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        async with asyncio.timeout(1000):
            await loop.run_in_executor(None, time.sleep, PATIENCE + 0.1)
        assert 0 < loop.time() <= time.monotonic() - began

    run(main)


@pytest.mark.parametrize("timer, looks", [(True, 1), (False, 1), (False, 2)])
def test_a_call_from_a_thread_in_the_moment_of_the_jump_comes_before_it(timer: bool, looks: int) -> None:
    """It is in the ready queue before it is in the wake-up socket, which was just found empty."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        called: asyncio.Future[float] = loop.create_future()
        poll = loop._jumping.poll
        left = looks

        def late(timeout: float | None) -> Any:
            nonlocal left
            found = poll(timeout)
            if not found and not loop._ready:
                left -= 1
                if left == 0:
                    loop._ready.append(asyncio.Handle(lambda: called.set_result(loop.time()), (), loop))
            return found

        loop._jumping.poll = late  # type: ignore[method-assign]
        if timer:
            async with asyncio.timeout(60):
                return await called
        return await called

    assert run(main) == 0.0


def test_a_thread_that_nobody_waits_for_holds_nothing() -> None:
    stop = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, stop.wait).cancel()
        began = time.monotonic()
        await asyncio.sleep(DAY)
        assert time.monotonic() - began < 5
        stop.set()

    run(main)


def test_threads_that_call_back_are_not_missed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen: list[int] = []

        def work() -> None:
            for number in range(200):
                loop.call_soon_threadsafe(seen.append, number)

        async def ticks() -> None:
            while True:
                await asyncio.sleep(0)

        ticking = asyncio.create_task(ticks())
        await asyncio.gather(*(loop.run_in_executor(None, work) for _ in range(8)))
        await asyncio.sleep(0)
        assert len(seen) == 8 * 200
        ticking.cancel()

    for seed in range(3):
        run(main, seed=seed)


def test_a_foreign_thread_may_still_end_what_looks_like_a_deadlock() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        timer = threading.Timer(0.05, lambda: loop.call_soon_threadsafe(future.set_result, "done"))
        timer.start()
        return await future

    assert run(main) == "done"


def test_closing_waits_for_the_default_executor_without_a_warning() -> None:
    began, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go.wait()
        time.sleep(0.05)
        ended.set()

    async def main() -> None:
        future = asyncio.get_running_loop().run_in_executor(None, work)
        began.wait()
        future.cancel()
        go.set()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(main)
    assert ended.is_set()


def test_real_sockets_are_served() -> None:
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            right.setblocking(False)
            reading = asyncio.create_task(loop.sock_recv(left, 10))
            await asyncio.sleep(60)
            await loop.sock_sendall(right, b"hello")
            return await reading

    assert run(main) == b"hello"


# --- what never ends -------------------------------------------------------------------------------------------------


def test_a_deadlock_is_an_error_that_names_who_waits_and_where() -> None:
    async def inner() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(inner(), name="the waiter")
            await asyncio.Queue[int]().get()

    with pytest.raises(Deadlock) as caught:
        run(main)
    text = str(caught.value)
    assert text.startswith("nothing can happen any more")
    assert re.search(r"the waiter: inner \(test_loop\.py:\d+\)", text)
    assert re.search(r": main \(test_loop\.py:\d+\) > get \(queues\.py:\d+\)", text)


def test_after_a_deadlock_every_task_is_cancelled_and_cleans_up() -> None:
    cleaned: list[str] = []

    async def main() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(60)
            cleaned.append("main")

    with pytest.raises(Deadlock):
        run(main)
    assert cleaned == ["main"]


def test_a_deadlock_ends_anyio_run_too() -> None:
    with pytest.raises(Deadlock):
        anyio.run(anyio.sleep_forever, backend_options={"loop_factory": virtual_loop()})


@pytest.mark.parametrize("limits", [{"horizon": 5000.0}, {"jumps": 50}])
def test_timers_that_repeat_for_ever_are_a_deadlock(limits: dict[str, float]) -> None:
    class Short(VirtualLoop):
        pass

    for name, value in limits.items():
        setattr(Short, name, value)

    async def beat() -> None:
        while True:
            await asyncio.sleep(20)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(beat())
            await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match="only timers run") as caught, asyncio.Runner(loop_factory=Short) as runner:
        runner.run(main())
    assert "beat (test_loop.py:" in str(caught.value)


# --- ways to use it --------------------------------------------------------------------------------------------------


async def _now_after(seconds: float) -> float:
    await anyio.sleep(seconds)
    return anyio.current_time()


_WAYS: list[Callable[[], float]] = [
    lambda: run(lambda: _now_after(60)),
    lambda: run(_now_after(60), seed=1),
    lambda: anyio.run(_now_after, 60, backend_options={"loop_factory": virtual_loop()}),
    lambda: anyio.run(_now_after, 60, backend_options={"loop_factory": virtual_loop(seed=1)}),
    lambda: anyio.run(_now_after, 60, backend_options={"loop_factory": VirtualLoop}),
    lambda: _runner(_now_after(60)),
]


def _runner(main: Any) -> float:
    with asyncio.Runner(loop_factory=virtual_loop(3), debug=True) as runner:
        assert runner.run(main) == 60.0
        result: float = runner.run(_now_after(60)) - 60
        return result


@pytest.mark.parametrize("way", range(len(_WAYS)))
def test_it_runs_wherever_a_loop_factory_is_taken(way: int) -> None:
    assert _WAYS[way]() == 60.0


def test_run_returns_the_result_and_raises_the_error_of_main() -> None:
    async def main(value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value

    assert run(functools.partial(main, 3)) == 3
    with pytest.raises(ValueError, match="-1"):
        run(functools.partial(main, -1))


def test_a_loop_shows_its_time_and_its_seed() -> None:
    async def main() -> str:
        await asyncio.sleep(90)
        return repr(asyncio.get_running_loop())

    assert run(main, seed=7) == "<VirtualLoop at 90 s seed=7 running=True closed=False>"


def _work(value: int) -> int:
    time.sleep(0.002)
    return value


# --- quiet -----------------------------------------------------------------------------------------------------------


def test_quiet_comes_when_all_that_is_ready_has_run_and_time_has_not_moved() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        ran: list[str] = []

        async def steps() -> None:
            for _ in range(50):
                await asyncio.sleep(0)
            ran.append("now")
            await asyncio.sleep(10)
            ran.append("later")
            await asyncio.sleep(0)
            ran.append("after")

        async with asyncio.timeout(1000), asyncio.TaskGroup() as group:
            group.create_task(steps())
            await loop.quiet()
            assert (ran, loop.time()) == (["now"], 0.0)
            moves = loop.moves
            await loop.quiet()
            assert (ran, loop.time()) == (["now"], 0.0)
            await loop.quiet(after=moves)
            assert (ran, loop.time()) == (["now", "later", "after"], 10.0)

    run(main)


def test_quiet_after_a_move_comes_when_a_thread_has_called_back() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        future = loop.run_in_executor(None, _work, 5)
        async with asyncio.timeout(1000):
            await loop.quiet(after=loop.moves)
        assert future.done()
        assert loop.time() == 0.0

    run(main)
