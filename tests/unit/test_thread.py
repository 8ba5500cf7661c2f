"""The loop thread's parts that the blocking facade alone does not show."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from brokerkit._thread import LoopThread, Portal, begin


async def begun(steps: list[str]) -> int:
    """Return what shows that the first step of a task is taken at once, and the rest as in any task."""

    async def main() -> int:
        steps.append("first")
        async with asyncio.timeout(10):  # needs to be in a task
            await asyncio.sleep(0)
        steps.append("second")
        return 42

    loop = asyncio.get_running_loop()
    done: asyncio.Future[asyncio.Task[int]] = loop.create_future()

    def now() -> None:
        task = begin(loop, main())
        assert steps == ["first"]
        done.set_result(task)

    loop.call_soon(now)
    return await (await done)


def test_a_task_can_begin_at_once() -> None:
    steps: list[str] = []
    assert asyncio.run(begun(steps)) == 42
    assert steps == ["first", "second"]


def test_what_begins_at_once_may_end_or_fail_at_once_too() -> None:
    name: ContextVar[str] = ContextVar("name")

    async def value() -> str:
        name.set("inside")
        return "value"

    async def fail() -> None:
        raise LookupError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def now() -> None:
            assert begin(loop, value()).result() == "value"
            with pytest.raises(LookupError):
                begin(loop, fail()).result()
            assert name.get("outside") == "outside"
            done.set_result(None)

        loop.call_soon(now)
        await done
        await asyncio.sleep(0)  # the loop goes on as before

    asyncio.run(main())


def test_what_still_runs_at_the_end_is_cancelled() -> None:
    thread = LoopThread()
    portal: Portal = thread.enter()
    started: asyncio.Event = portal.call(asyncio.Event)

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    future = portal.start_task_soon(forever)
    portal.call(started.wait)
    thread.leave()
    assert future.cancelled()
    with pytest.raises(RuntimeError):
        portal.start_task_soon(forever)


def test_a_loop_that_ended_begins_anew() -> None:
    thread = LoopThread()
    first = thread.enter()
    assert thread.enter() is first
    thread.leave()
    assert first.call(int, "7") == 7
    thread.leave()
    second = thread.enter()
    assert second is not first
    assert second.call(int, "8") == 8
    thread.leave()
