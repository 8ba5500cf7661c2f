"""Celery in one process, on memory://: what an application's own tests run it with."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError

from brokerkit.celery import AsyncWorker, Celery, adelay, apply
from brokerkit.celery._publish import close

from .workers import PATIENCE

pytestmark = pytest.mark.asyncio
LIMIT = 15 * PATIENCE


app = Celery("memory", broker="memory://", backend="cache+memory://")
app.conf.task_default_queue = "in-memory"
ran: Counter[tuple[int, int]] = Counter()


@app.task(name="m.add")
async def add(x: int, y: int) -> int:
    ran[x, y] += 1
    return x + y


@app.task(name="m.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(name="m.third", bind=True)
async def third(self: Any) -> int:
    if self.request.retries < 2:
        self.retry(countdown=0.01)
    retries: int = self.request.retries
    return retries


@pytest_asyncio.fixture(autouse=True)
async def worker() -> AsyncIterator[None]:
    """Run the worker beside each test."""
    ran.clear()
    # What an application has pooled may be closed by now: other tests of this process reset all pools.
    app.close()
    app.__dict__.pop("amqp", None)
    async with AsyncWorker(app, concurrency=8):
        yield
    close(app)


@pytest.mark.feature("tasks", "async_tasks", "adelay", "async_worker", system="memory")
async def test_each_task_runs_once() -> None:
    results = [await adelay(add, number, 1) for number in range(200)]
    assert [await result.get(LIMIT) for result in results] == [number + 1 for number in range(200)]
    assert set(ran.values()) == {1}


@pytest.mark.feature("retry", system="memory")
async def test_a_task_is_tried_again() -> None:
    assert await (await adelay(third)).get(LIMIT) == 2


@pytest.mark.feature("canvas", system="memory")
async def test_chains_groups_and_chords() -> None:
    assert await (await apply(chain(add.s(1, 2), add.s(3)))).get(LIMIT) == 6
    assert await (await apply(group(add.s(n, n) for n in range(4)))).get(LIMIT) == [0, 2, 4, 6]
    assert await (await apply(chord([add.s(n, n) for n in range(4)], total.s()))).get(LIMIT) == 12


@pytest.mark.feature("countdown", system="memory")
async def test_a_countdown_is_not_early_and_once() -> None:
    begin = time.monotonic()
    assert await (await apply(add.s(5, 5), countdown=1)).get(LIMIT) == 10
    assert time.monotonic() - begin >= 1
    assert ran[5, 5] == 1


@pytest.mark.feature("revoke", system="memory")
async def test_a_task_that_waits_is_revoked() -> None:
    result = await apply(add.s(6, 6), countdown=1)
    await result.revoke()
    with pytest.raises(TaskRevokedError):
        await result.get(LIMIT)
    assert not ran


@pytest.mark.feature("inspect", system="memory")
async def test_the_worker_answers() -> None:
    answers = await asyncio.to_thread(app.control.inspect(timeout=5, limit=1).registered)
    assert {"m.add", "m.third"} <= {name for names in answers.values() for name in names}
