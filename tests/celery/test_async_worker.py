"""A worker inside of an asyncio program, with its tasks on the program's loop."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError
from kombu import pools

import brokerkit as bk
from brokerkit.celery._names import service_queue as queue
from brokerkit.celery._publish import adelay, apply, task_message
from brokerkit.celery.worker import AsyncWorker

from .apps.coroutines import build
from .systems import System
from .workers import PATIENCE

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning"),  # of Celery's backend for Redis
    pytest.mark.filterwarnings(
        "ignore:unclosed .socket:ResourceWarning"
    ),  # its connections belong to threads that have ended
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # as it is told of them
]
LIMIT = 15 * PATIENCE


@pytest.fixture
def app(system: System) -> Any:
    """Return an application whose results are in Redis, and whose broker is the system's."""
    with system.crew(Path("unused"), ours=True) as crew:
        options = crew.settings.config["broker_transport_options"]
        made = build(crew.settings.broker, crew.settings.backend, broker_transport_options=options)
        yield made
        made.close()
        pools.reset()  # Celery leaves what it has pooled to the process


def broker_of(app: Any) -> bk.Broker:
    """Return a broker of brokerkit's own at the place where *app* publishes."""
    url = str(app.conf.broker_url).removeprefix("brokerkit+")
    return bk.connect(url, options=app.conf.broker_transport_options)


@pytest.mark.feature("async_worker", "adelay", "async_tasks")
async def test_tasks_run_on_the_programs_loop_and_results_are_awaited(system: System, app: Any) -> None:
    tasks = app.tasks
    async with AsyncWorker(app, concurrency=20) as worker:
        result = await adelay(tasks["c.add"], 2, 3)
        assert await result.get(LIMIT) == 5
        assert await result == 5
        _, loop, thread = await (await adelay(tasks["c.loop"])).get(LIMIT)
        assert (loop, thread) == (id(asyncio.get_running_loop()), threading.current_thread().name)
        header = [tasks["c.add"].s(n, n) for n in range(4)]
        assert await (await apply(chord(header, tasks["c.total"].s()))).get(LIMIT) == 12
        pong = await asyncio.to_thread(app.control.inspect(timeout=5, limit=1).ping)
        assert [*pong.values()] == [{"ok": "pong"}]
        assert str(worker.stock) in repr(worker)


async def test_results_over_the_broker_are_awaited_be_they_of_tasks_groups_or_chains() -> None:
    app = build("memory://", "rpc://", broker_transport_options={"prefix": f"{secrets.token_hex(3)}."})
    add = app.tasks["c.add"]
    try:
        async with AsyncWorker(app, concurrency=20):
            many = await apply(group(add.s(n, n) for n in range(20)))
            assert await many.get(LIMIT) == [2 * n for n in range(20)]
            each = [await adelay(add, n, 0) for n in range(20)]
            assert [await result.get(LIMIT) for result in reversed(each)] == [*reversed(range(20))]
            assert await (await apply(chain(add.s(1, 2), add.s(4)))).get(LIMIT) == 7
            assert await many.get(LIMIT) == [2 * n for n in range(20)]
    finally:
        app.close()
        pools.reset()


@pytest.mark.feature("service")
async def test_a_service_reads_what_celery_publishes_and_publishes_tasks(system: System, app: Any) -> None:
    """The other way round is the queue's too: a task that the service publishes runs in Celery's worker."""
    service = bk.Service("audit")
    celery = {"redis": queue("audit"), "kafka": queue("audit", priorities=1)}[system.name]
    work = {"redis": queue("coroutines"), "kafka": queue("coroutines", priorities=1)}[system.name]
    seen: asyncio.Queue[str] = asyncio.Queue()

    @service.subscribe(celery)
    async def audit(message: bk.Message[Any]) -> None:
        envelope = message.value
        await message.publish(
            work, task_message("c.add", (20, 22), queue="coroutines", id=f"{envelope.headers['id']}-2")
        )
        seen.put_nowait(f"{envelope.headers['task']} {envelope.body}")

    async with AsyncWorker(app), broker_of(app) as broker, service.running(broker):
        await apply(app.tasks["c.add"].s(1, 2), queue="audit", task_id="one")
        async with asyncio.timeout(LIMIT):
            assert (await seen.get()).startswith("c.add [[1, 2], {}")
        result = app.AsyncResult("one-2")
        end = time.monotonic() + LIMIT
        while not await asyncio.to_thread(result.ready):
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        assert result.result == 42
        app.backend.result_consumer.stop()


@pytest.mark.feature("revoke_terminate", "time_limits", pool="async")
async def test_revoking_and_limits_reach_the_coroutine(system: System, app: Any, tmp_path: Path) -> None:
    async with AsyncWorker(app, concurrency=5):
        history = tmp_path / "revoked"
        result = await adelay(app.tasks["c.long"], str(history))
        await until(history.exists)
        await result.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            await result.get(LIMIT)
        await until(lambda: history.read_text() == "began\ncancelled\n")
        assert await (await adelay(app.tasks["c.softly"], "catch")).get(LIMIT)


async def until(held: Any) -> None:
    end = time.monotonic() + LIMIT
    while not held():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------------- in memory


@pytest.fixture
def local() -> Any:
    made = build("memory://", "cache+memory://", broker_transport_options={"prefix": f"{secrets.token_hex(3)}."})
    yield made
    made.close()
    pools.reset()


async def test_there_is_one_worker_in_a_process_and_another_one_afterwards(local: Any) -> None:
    async with AsyncWorker(local):
        with pytest.raises(bk.errors.ConfigError, match="has a worker"):
            async with AsyncWorker(local):
                raise AssertionError("two workers")
        assert await (await adelay(local.tasks["c.add"], 1, 1)).get(LIMIT) == 2
    async with AsyncWorker(local):
        assert await (await adelay(local.tasks["c.add"], 1, 2)).get(LIMIT) == 3
        stock = await asyncio.to_thread(local.tasks["c.add"].delay, 2, 2)
        assert await asyncio.to_thread(stock.get, LIMIT) == 4  # this program is more than its worker


async def test_leaving_lets_tasks_end_within_their_time_and_cancels_them_then(local: Any, tmp_path: Path) -> None:
    async with AsyncWorker(local, stop_timeout=LIMIT):
        result = await adelay(local.tasks["c.nap"], 0.3)
        await until(lambda: running(local) == 1)
    assert await result.get(LIMIT) == 0.3

    history = tmp_path / "history"
    async with AsyncWorker(local, stop_timeout=0.2):
        await apply(local.tasks["c.long"].s(str(history)))
        await until(history.exists)
        begin = time.monotonic()
    assert time.monotonic() - begin < LIMIT
    assert history.read_text() == "began\ncancelled\n"


async def test_what_is_cancelled_and_not_acknowledged_runs_again(local: Any, tmp_path: Path) -> None:
    local.tasks["c.long"].acks_late = True
    history = tmp_path / "history"
    async with AsyncWorker(local, stop_timeout=0.2):
        await adelay(local.tasks["c.long"], str(history))
        await until(history.exists)
    assert history.read_text() == "began\ncancelled\n"
    async with AsyncWorker(local, stop_timeout=0.2):
        await until(lambda: history.read_text() == "began\ncancelled\nbegan\n")


async def test_what_ends_while_the_worker_is_stopped_does_not_run_again(local: Any, tmp_path: Path) -> None:
    local.tasks["c.count"].acks_late = True
    history = tmp_path / "history"
    results = [await adelay(local.tasks["c.count"], str(history)) for _ in range(4)]
    async with AsyncWorker(local, concurrency=2, stop_timeout=LIMIT):
        await until(lambda: running(local) == 2 or history.exists())
    async with AsyncWorker(local, concurrency=2):
        assert [await result.get(LIMIT) for result in results] == [None] * 4
    assert history.read_text() == "ran\n" * 4


async def test_a_worker_that_is_shut_down_from_afar_says_so(local: Any) -> None:
    async with AsyncWorker(local) as worker:
        await asyncio.to_thread(local.control.shutdown)
        async with asyncio.timeout(LIMIT):
            await worker.wait()


async def test_entering_gives_up_where_there_is_no_broker() -> None:
    app = build("redis://127.0.0.1:1", "cache+memory://")
    begin = time.monotonic()
    with pytest.raises(bk.errors.BrokerUnavailable, match="does not consume after"):
        async with AsyncWorker(app, start_timeout=0.5):
            raise AssertionError("entered")
    assert time.monotonic() - begin < LIMIT
    app.close()


async def test_a_program_that_is_cancelled_leaves_no_worker_behind(local: Any) -> None:
    entered = asyncio.Event()

    async def program() -> None:
        async with AsyncWorker(local):
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(program())
    async with asyncio.timeout(LIMIT):
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for thread in threading.enumerate():
        if thread.name == "brokerkit worker of Celery":
            await asyncio.to_thread(thread.join, LIMIT)  # it may be in its last line
            assert not thread.is_alive()


def running(app: Any) -> int:
    from celery.worker import state

    return len(state.active_requests)
