"""The pool by itself, and what the worker is told of its jobs."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from billiard.exceptions import Terminated, WorkerLostError
from celery.exceptions import Reject

from brokerkit.celery import _running
from brokerkit.celery.pool import TaskPool

from .apps.coroutines import build
from .workers import PATIENCE

LIMIT = 10 * PATIENCE


class Told:
    """What the worker hears of one job."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self._changed = threading.Condition()

    def hear(self, what: str) -> Callable[..., None]:
        def heard(*args: Any) -> None:
            with self._changed:
                self.heard.append((what, *args))
                self._changed.notify_all()

        return heard

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "accept_callback": self.hear("accepted"),
            "callback": self.hear("done"),
            "error_callback": self.hear("failed"),
            "timeout_callback": self.hear("timeout"),
        }

    def what(self) -> list[str]:
        return [told[0] for told in self.heard]

    def until(self, count: int) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.heard) >= count, LIMIT), self.heard
        return self.what()


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    made = TaskPool(2, app=build("memory://", "cache+memory://"))
    made.start()
    yield made
    made.terminate()


def raised(told: Told) -> BaseException:
    """Return what the worker was told to have been raised."""
    error: Any = told.heard[1][1].exception
    return cast("BaseException", getattr(error, "exc", error))  # in a box that carries the traceback


def give(pool: TaskPool, target: Callable[..., Any], *args: Any, **options: Any) -> tuple[Told, Any]:
    told = Told()
    return told, pool.apply_async(target, args, {}, **told.callbacks(), **options)


def traced(pool: TaskPool, name: str) -> Callable[..., Any]:
    """Return what calls a task's body as Celery's tracer does."""
    task: Any = pool.app.tasks[name]
    return lambda _name, *args: task.apply(args, throw=True).get(disable_sync_subtasks=False)


def test_a_job_is_accepted_and_done(pool: TaskPool) -> None:
    told, _ = give(pool, lambda x: x + 1, 1)
    assert told.until(2) == ["accepted", "done"]
    assert told.heard[1] == ("done", 2)


def test_what_a_job_raises_is_told(pool: TaskPool) -> None:
    def rejects() -> None:
        raise Reject("no", requeue=True)

    def exits() -> None:
        raise SystemExit(1)

    told, _ = give(pool, rejects)
    assert told.until(2) == ["accepted", "failed"]
    assert "Reject" in told.heard[1][1].traceback
    told, _ = give(pool, exits)
    assert told.until(2) == ["accepted", "failed"]
    assert isinstance(raised(told), WorkerLostError)
    told, _ = give(pool, lambda: "still works")
    assert told.until(2) == ["accepted", "done"]


def test_so_many_run_at_once_and_their_number_can_be_changed(pool: TaskPool) -> None:
    go, began = threading.Event(), threading.Semaphore(0)

    def job() -> None:
        began.release()
        assert go.wait(LIMIT)

    told = [give(pool, job)[0] for _ in range(4)]
    assert all(began.acquire(timeout=LIMIT) for _ in range(2))
    assert not began.acquire(timeout=0.1)
    assert (pool.num_processes, pool.info["running"], pool.info["waiting"]) == (2, 2, 2)
    pool.grow(1)
    assert began.acquire(timeout=LIMIT)
    assert not began.acquire(timeout=0.1)
    pool.shrink(2)
    go.set()
    for each in told:
        assert each.until(2) == ["accepted", "done"]
    end = time.monotonic() + LIMIT
    while pool.info["threads"] != 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    pool.shrink(5)
    assert pool.num_processes == 1


def test_threads_are_started_as_they_are_needed() -> None:
    pool = TaskPool(1000, app=build("memory://", "cache+memory://"))
    pool.start()
    for _ in range(5):
        told, _ = give(pool, lambda: None)
        told.until(2)
        until(lambda: pool.info["idle"] == pool.info["threads"])
    assert pool.info["threads"] == 1
    pool.stop()


def test_terminating_cancels_the_coroutine_and_says_which_signal(pool: TaskPool, tmp_path: Path) -> None:
    history = tmp_path / "history"
    told, job = give(pool, traced(pool, "c.long"), "c.long", str(history))
    until(history.exists)
    job.terminate(15)
    assert told.until(2) == ["accepted", "failed"]
    error = raised(told)
    assert (type(error), error.args) == (Terminated, (15,))
    assert history.read_text() == "began\ncancelled\n"


def test_what_is_terminated_before_it_began_does_not_begin(pool: TaskPool) -> None:
    go, ran = threading.Event(), threading.Event()
    blockers = [give(pool, go.wait, LIMIT) for _ in range(2)]
    told, job = give(pool, ran.set)
    job.terminate(15)
    go.set()
    for blocker, _ in blockers:
        blocker.until(2)
    assert told.until(1) == ["accepted"]  # the worker then says that it was revoked
    pool.stop()
    assert not ran.is_set()


def test_a_hard_limit_cancels_and_is_told_as_such(pool: TaskPool, tmp_path: Path) -> None:
    history = tmp_path / "history"
    told, _ = give(pool, traced(pool, "c.long"), "c.long", str(history), timeout=0.2)
    assert told.until(2) == ["accepted", "timeout"]
    assert told.heard[1] == ("timeout", False, 0.2)
    assert history.read_text() == "began\ncancelled\n"


def test_a_soft_limit_is_told_when_it_is_reached(pool: TaskPool) -> None:
    told, _ = give(pool, traced(pool, "c.softly"), "c.softly", "catch", soft_timeout=0.2)
    assert told.until(3) == ["accepted", "timeout", "done"]
    assert told.heard[1] == ("timeout", True, 0.2)


def test_a_coroutine_that_goes_on_is_cancelled_again(
    pool: TaskPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_running, "AGAIN", 0.1)
    path = tmp_path / "began"
    told, job = give(pool, traced(pool, "c.stubborn"), "c.stubborn", str(path))
    until(path.exists)
    job.terminate(15)
    assert told.until(2) == ["accepted", "failed"]


def test_a_coroutine_that_never_ends_is_left_to_itself(
    pool: TaskPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_running, "GRACE", 0.2)
    monkeypatch.setattr(_running, "AGAIN", 0.05)
    began, stop = threading.Event(), threading.Event()

    async def never() -> None:
        began.set()
        while not stop.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    pool.app.task(name="never")(never)
    told, job = give(pool, traced(pool, "never"), "never")
    assert began.wait(LIMIT)
    with caplog.at_level(logging.ERROR, "brokerkit"):
        job.terminate(15)
        assert told.until(2) == ["accepted", "failed"]
    assert "left to itself" in caplog.text
    stop.set()


def test_stopping_waits_for_what_runs_and_drops_what_waits() -> None:
    pool = TaskPool(1, app=build("memory://", "cache+memory://"))
    pool.start()
    go, began = threading.Event(), threading.Event()

    def job() -> None:
        began.set()
        assert go.wait(LIMIT)

    first, _ = give(pool, job)
    second, _ = give(pool, job)
    assert began.wait(LIMIT)
    pool.close()  # as the worker does, before it stops
    threading.Timer(0.2, go.set).start()
    pool.stop()
    assert first.what() == ["accepted", "done"]
    assert second.what() == []


def test_terminating_the_pool_tells_nobody(pool: TaskPool, tmp_path: Path) -> None:
    """What was not acknowledged must run again, so nothing may be said of its end."""
    history = tmp_path / "history"
    told, _ = give(pool, traced(pool, "c.long"), "c.long", str(history))
    until(history.exists)
    begin = time.monotonic()
    pool.terminate()
    assert time.monotonic() - begin < LIMIT
    assert told.what() == ["accepted"]
    assert history.read_text() == "began\ncancelled\n"


def test_limits_of_plain_tasks_are_warned_of_once(pool: TaskPool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "brokerkit"):
        for name in ("c.plain", "c.plain", "c.add"):
            told, _ = give(pool, lambda _name: None, name, timeout=30)
            told.until(2)
    assert [record.getMessage() for record in caplog.records if "time limit" in record.getMessage()] == [
        "c.plain has a time limit, which is not served: it is no async def, and threads cannot be ended"
    ]


def until(held: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not held():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_loop_of_tasks_that_broke_down_is_replaced() -> None:
    home = _running.Home()
    home.known = asyncio.new_event_loop()
    home.known.close()
    loop = home.loop()
    assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "here"), loop).result(LIMIT) == "here"
    assert home.loop() is loop
    home._thread.leave()


def test_what_tasks_have_left_behind_cleans_up_when_the_process_ends() -> None:
    program = """
import asyncio
from brokerkit.celery import Celery
app = Celery(broker="memory://")
@app.task
async def begin():
    async def go_on():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            print("cleaned up", flush=True)
    kept.append(asyncio.create_task(go_on()))
    await asyncio.sleep(0)
kept = []
begin.apply().get()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (run.stdout, run.stderr) == ("cleaned up\n", "")
