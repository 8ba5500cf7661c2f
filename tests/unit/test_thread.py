"""The loop thread's parts that the blocking facade alone does not show."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import Any

import pytest

from brokerkit._thread import LoopThread, Portal, begin, result


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
    started: asyncio.Event = result(portal.start_task_soon(asyncio.Event))

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    future = portal.start_task_soon(forever)
    result(portal.start_task_soon(started.wait))
    thread.leave()
    assert future.cancelled()
    with pytest.raises(RuntimeError):
        portal.start_task_soon(forever)


def test_a_loop_that_ended_begins_anew() -> None:
    thread = LoopThread()
    first = thread.enter()
    assert thread.enter() is first
    thread.leave()
    assert result(first.start_task_soon(int, "7")) == 7
    thread.leave()
    second = thread.enter()
    assert second is not first
    assert result(second.start_task_soon(int, "8")) == 8
    thread.leave()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_would_end_a_program_ends_no_loop_that_others_use(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    thread = LoopThread()
    portal = thread.enter()
    going = portal.start_task_soon(asyncio.sleep, 0.05, "went on")

    def end() -> None:
        raise error

    async def end_in_a_task() -> None:
        end()

    def begin_to_end() -> None:
        portal.loop.call_soon(end)
        portal.loop.create_task(end_in_a_task())

    result(portal.start_task_soon(begin_to_end))
    with pytest.raises(type(error)):
        result(portal.start_task_soon(end))
    assert going.result(10) == "went on"
    assert result(portal.start_task_soon(int, "7")) == 7
    thread.leave()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [type(error)] * 2


def test_tasks_can_neither_stop_the_loop_nor_cancel_it() -> None:
    thread = LoopThread()
    portal = thread.enter()

    async def tidy() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        portal.loop.stop()

    result(portal.start_task_soon(tidy))
    for number in range(3):
        assert portal.start_task_soon(asyncio.sleep, 0.01, number).result(10) == number
    thread.leave()


def test_a_loop_that_breaks_down_ends_what_it_ran_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = LoopThread()
    broken = thread.enter()
    waiting = broken.start_task_soon(asyncio.sleep, 60)

    def select(timeout: float | None = None) -> Any:
        patch.undo()
        raise OSError("closed by somebody")

    def break_down() -> None:
        patch.setattr(selector, "select", select)

    selector: Any = broken.loop._selector  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        broken.loop.call_soon_threadsafe(break_down)
        with pytest.raises(CancelledError):
            waiting.result(10)
    assert thread._join is not None
    thread._join()
    anew = thread.enter()
    assert anew.start_task_soon(asyncio.sleep, 0, "here").result(10) == "here"
    thread.leave()
    thread.leave()
    assert anew.loop.is_closed()


ENDS = """
import asyncio, atexit
from brokerkit._thread import LOOP, result

portal = LOOP.enter()
atexit.register(lambda: print(portal.loop.is_closed()))
atexit.register(LOOP.leave)
result(portal.start_task_soon(asyncio.to_thread, int))
"""


def test_a_program_that_used_threads_of_the_loop_ends_quietly() -> None:
    """Python 3.12 starts no thread as it ends, and asyncio wants one to wait for those of its executor."""
    command = [sys.executable, "-W", "error", "-c", ENDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
