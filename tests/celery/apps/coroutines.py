"""Tasks that are coroutines, for the tests of them: built in the tests' own process, and in those of workers."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from celery import current_task, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from brokerkit.celery import Celery

VARIABLE = "BROKERKIT_TEST_COROUTINES"
"""Names the settings of a worker's application, in JSON: broker, backend and configuration."""


@shared_task
async def shared(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


async def total(values: list[int]) -> int:
    await asyncio.sleep(0)
    return sum(values)


def plain(value: int) -> int:
    return value


async def loop() -> tuple[int, int, str]:
    """Return which loop of which process this is, and its thread."""
    return os.getpid(), id(asyncio.get_running_loop()), threading.current_thread().name


async def who(self: Any, seconds: float) -> bool:
    """Tell whether the request is this task's own, all the time, in threads that it starts too."""
    mine = self.request.id
    seen = [current_task.request.id, self.request.id]
    await asyncio.sleep(seconds)
    seen += [current_task.request.id, self.request.id]
    seen += await asyncio.to_thread(lambda: [current_task.request.id, self.request.id])
    async with asyncio.TaskGroup() as group:
        child = group.create_task(asyncio.sleep(0, self.request.id))
    return {*seen, child.result()} == {mine}


async def again(self: Any, times: int) -> int:
    if self.request.retries < times:
        raise self.retry(countdown=0, max_retries=2)
    return int(self.request.retries)


async def give_up(self: Any) -> str:
    try:
        self.retry(countdown=0, max_retries=self.request.retries)
    except self.MaxRetriesExceededError:
        return "gave up"
    raise AssertionError("retry() came back")


async def fail(message: str) -> None:
    raise ValueError(message)


async def recover(self: Any) -> int:
    if self.request.retries < 2:
        raise ValueError(self.request.retries)
    return int(self.request.retries)


async def softly(self: Any, how: str) -> str:
    try:
        if how == "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
        else:
            await asyncio.sleep(60)
    except SoftTimeLimitExceeded:
        if how == "raise":
            raise
        await asyncio.sleep(0)  # cleaning up may take a while
        return f"cleaned up, {len(asyncio.all_tasks())} left"
    return "was not interrupted"


async def long(path: str) -> None:
    """Take a minute; say when it begins, and how it ends."""
    with Path(path).open("a") as file:
        file.write("began\n")
        file.flush()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            file.write("cancelled\n")
            raise
        file.write("ended\n")


async def stubborn(path: str) -> str:
    """Take a minute, and go on when it is cancelled once."""
    await asyncio.to_thread(Path(path).touch)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(60)
    return "went on"


async def nested() -> list[int]:
    """Call tasks as functions: a coroutine is awaited, and a plain one is not."""
    return [await add_task(1, 2), plain_task(3)]


async def publishes(self: Any) -> Any:
    """Publish a task from within a task; return what the child says of its parents."""
    from brokerkit.celery._publish import adelay

    child = await adelay(parents_task)
    return [self.request.id, *await child.get(30), self.request.children[0].id == child.id]


async def parents(self: Any) -> list[str]:
    return [self.request.parent_id, self.request.root_id]


async def exits() -> str:
    """Have the program end in a task of its own, as a library may do."""

    async def leave() -> None:
        sys.exit(3)

    asyncio.create_task(leave())  # noqa: RUF006  # what becomes of it is the point
    await asyncio.sleep(0.1)
    return "went on"


async def ignored() -> None:
    raise Ignore


async def rejected() -> None:
    raise Reject("no", requeue=False)


async def nap(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def count(path: str) -> None:
    await asyncio.sleep(0.3)
    with Path(path).open("a") as file:
        file.write("ran\n")


def busy(path: str) -> str:
    """Work in a thread until there is the file."""
    end = time.monotonic() + 60
    Path(path + ".began").touch()
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.01)
    return "done"


add_task: Any = None
plain_task: Any = None
parents_task: Any = None


def build(broker: str, backend: str, **config: Any) -> Celery:
    """Return an application with all of these tasks."""
    global add_task, plain_task, parents_task
    app = Celery("coroutines", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        task_default_queue="coroutines",
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        **config,
    )
    bound: list[tuple[Any, dict[str, Any]]] = [
        (who, {}),
        (again, {}),
        (give_up, {}),
        (recover, {"autoretry_for": (ValueError,), "retry_kwargs": {"countdown": 0}}),
        (softly, {"soft_time_limit": 0.5}),
        (publishes, {}),
        (parents, {}),
    ]
    for function, options in bound:
        app.task(bind=True, name=f"c.{function.__name__}", **options)(function)
    for function in (add, total, plain, loop, fail, long, stubborn, nested, exits, ignored, rejected, nap, count, busy):
        app.task(name=f"c.{function.__name__}")(function)
    app.task(name="c.limited", time_limit=0.5)(long)
    app.finalize()
    add_task, plain_task, parents_task = app.tasks["c.add"], app.tasks["c.plain"], app.tasks["c.parents"]
    return app


if VARIABLE in os.environ:
    settings = msgspec.json.decode(os.environ[VARIABLE], type=dict[str, Any])
    app = build(settings["broker"], settings["backend"], **settings["config"])
