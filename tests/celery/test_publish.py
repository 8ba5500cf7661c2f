"""Publishing from asyncio: what reaches the queues, and that no loop waits for a broker."""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
import threading
import time
import weakref
from datetime import UTC, datetime, timedelta
from typing import Any

import celery
import pytest
from celery import chain, chord, group, signals
from kombu import pools
from kombu.exceptions import OperationalError

import brokerkit as bk
from brokerkit import blocking
from brokerkit.celery import Result, _publish, adelay, apply, asend_task, queue, task_message
from brokerkit.celery._bridge import Bridge
from brokerkit.celery._collect import WouldBlock
from brokerkit.celery._results import Watcher
from brokerkit.celery.worker import AsyncWorker

from .apps.coroutines import build
from .workers import PATIENCE

pytestmark = pytest.mark.asyncio
LIMIT = 10 * PATIENCE


@pytest.fixture
def app() -> Any:
    made = build("memory://", "cache+memory://", broker_transport_options={"prefix": f"{secrets.token_hex(3)}."})
    yield made
    made.close()
    pools.reset()


async def take(app: Any, queue: str = "coroutines") -> Any:
    """Return the next message of a queue."""
    message = await asyncio.to_thread(take_now, app, queue)
    assert message is not None
    return message


def take_now(app: Any, queue: str = "coroutines") -> Any:
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue)
        if message is not None:
            message.ack()
        return message


def take_all(app: Any) -> set[str]:
    """Return the ids of the tasks in the queue."""
    found = set()
    with app.connection_for_read() as connection:
        while (message := connection.default_channel.basic_get("coroutines")) is not None:
            message.ack()
            found.add(message.headers["id"])
    return found


async def test_what_is_published_is_what_celery_publishes(app: Any) -> None:
    stock = await asyncio.to_thread(app.tasks["c.add"].apply_async, (1,), {"y": 2}, priority=3)
    result = await apply(app.tasks["c.add"].s(1, y=2), priority=3)
    one, other = await take(app), await take(app)
    assert (one.headers["id"], other.headers["id"]) == (stock.id, result.id)
    same = {"id", "root_id", "origin"}
    assert {k: v for k, v in one.headers.items() if k not in same} == {
        k: v for k, v in other.headers.items() if k not in same
    }
    assert one.body == other.body
    assert one.properties.keys() == other.properties.keys()
    assert other.properties["priority"] == 3


async def test_after_the_first_call_celery_runs_on_the_callers_thread(app: Any) -> None:
    seen: list[str] = []

    def publishes(**_: object) -> None:
        seen.append(threading.current_thread().name)

    signals.before_task_publish.connect(publishes)
    try:
        for _ in range(3):
            await adelay(app.tasks["c.add"], 1, 2)
    finally:
        signals.before_task_publish.disconnect(publishes)
    mine = threading.current_thread().name
    assert seen[0] != mine
    assert seen[-1] == mine


async def test_many_tasks_publish_at_once_and_others_of_the_loop_go_on(app: Any) -> None:
    await adelay(app.tasks["c.add"], 0, 0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await take(app)
    results = await asyncio.gather(*(adelay(app.tasks["c.add"], n, n) for n in range(100)))
    counting.cancel()
    assert turns >= 100 // _publish.AT_ONCE
    found = await asyncio.to_thread(take_all, app)
    assert found == {result.id for result in results}


async def test_what_would_wait_is_made_again_in_a_thread(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await adelay(app.tasks["c.add"], 0, 0)
    task: Any = app.tasks["c.add"]
    stock, threads = task.apply_async, []

    def apply_async(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise WouldBlock
        return stock(*args, **options)

    monkeypatch.setattr(task, "apply_async", apply_async)
    await take(app)
    result = await adelay(task, 1, 1)
    assert (await take(app)).headers["id"] == result.id
    assert await asyncio.to_thread(take_now, app) is None
    assert threads[0] == threading.current_thread().name != threads[1]


async def test_a_new_queue_is_declared_without_waiting_on_the_loop(app: Any) -> None:
    await adelay(app.tasks["c.add"], 0, 0)
    await apply(app.tasks["c.add"].s(1, 1), queue="another")
    assert json.loads((await take(app, "another")).body)[0] == [1, 1]


async def test_a_broker_that_is_away_raises_what_celery_raises_and_blocks_nothing() -> None:
    app = build("redis://127.0.0.1:1", "cache+memory://", task_publish_retry=False)
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    begin = time.monotonic()
    with pytest.raises(OperationalError):
        await adelay(app.tasks["c.add"], 1, 2)
    watching.cancel()
    assert longest < (time.monotonic() - begin) / 2
    app.close()
    pools.reset()


async def test_a_loop_that_has_ended_leaves_nothing_behind(app: Any) -> None:
    """Tests, and programs that call asyncio.run again and again, have many loops."""

    def one() -> None:
        asyncio.run(publish())

    async def publish() -> None:
        await adelay(app.tasks["c.add"], 1, 2)
        loops.add(asyncio.get_running_loop())

    loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
    for _ in range(3):
        await asyncio.to_thread(one)
    gc.collect()
    assert not loops
    assert len(vars(app)[_publish._SENDER]._lines) == 0


async def test_what_is_settled_with_earlier_answers_needs_none_of_its_own() -> None:
    loop, line, wrong = asyncio.get_running_loop(), _publish._Line(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: wrong.append(context))
    task = loop.create_task(asyncio.sleep(0))
    await task
    sent = _publish._Sent(None, loop.create_future())  # type: ignore[arg-type]  # what was sent does not matter
    sent.task = task
    line._done(sent, task)
    line._settle()  # for an answer that came before
    assert sent.future.done()
    turn = loop.create_future()
    loop.call_soon(turn.set_result, None)
    await turn
    assert wrong == []


async def test_publishing_is_tried_again_as_the_configuration_says(app: Any) -> None:
    await adelay(app.tasks["c.add"], 0, 0)
    sender = vars(app)[_publish._SENDER]
    failures = [bk.errors.BrokerUnavailable("away")] * 2

    class Line(_publish._Line):
        async def send(self, frame: Any) -> None:
            if failures:
                raise failures.pop()
            await super().send(frame)

    sender._lines[asyncio.get_running_loop()] = Line()
    await take(app)
    result = await adelay(app.tasks["c.add"], 1, 2)
    assert (await take(app)).headers["id"] == result.id
    failures += [bk.errors.BrokerUnavailable("away")] * 2
    app.conf.task_publish_retry_policy = {"max_retries": 1, "interval_start": 0}
    with pytest.raises(OperationalError, match="away"):
        await adelay(app.tasks["c.add"], 1, 2)
    failures[:] = [bk.errors.BrokerUnavailable("away")]
    app.conf.task_publish_retry = False
    with pytest.raises(OperationalError, match="away"):
        await adelay(app.tasks["c.add"], 1, 2)


async def test_a_task_that_is_too_large_is_refused_by_its_own_name(app: Any) -> None:
    await adelay(app.tasks["c.add"], 0, 0)
    for _ in range(2):
        with pytest.raises(bk.errors.TooLarge):
            await adelay(app.tasks["c.plain"], "x" * 2_000_000)


async def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(app: Any) -> None:
    with pytest.raises(TypeError, match="argument"):
        await adelay(app.tasks["c.add"], 1)


async def test_other_brokers_than_brokerkits_are_published_to_in_a_thread() -> None:
    app = celery.Celery("other", broker="filesystem://", backend="cache+memory://", set_as_current=False)
    app.conf.broker_transport_options = {}
    sender = _publish._Sender(app)
    sender._waiting(lambda **options: options)
    assert not sender._ours
    assert sender._now(lambda **options: options) is None


async def test_a_task_by_its_name_needs_no_code(app: Any) -> None:
    nobody = celery.Celery(broker="brokerkit+memory://", set_as_current=False)
    nobody.conf.update(task_default_queue="coroutines", broker_transport_options=app.conf.broker_transport_options)
    async with AsyncWorker(app, without_gossip=True, without_mingle=True):
        result = await asend_task(nobody, "c.add", (20, 22))
        assert await Result(app.AsyncResult(result.id), Watcher(app)).get(LIMIT) == 42
    _publish.close(nobody)


async def test_a_message_of_a_task_runs_like_any_other(app: Any) -> None:
    due = datetime.now(UTC) + timedelta(seconds=0.3)
    messages = [
        task_message("c.add", (1,), {"y": 2}, queue="coroutines", id="one", eta=due),
        task_message("c.again", (1,), queue="coroutines", id="two"),
    ]

    def publish() -> None:
        with blocking.connect("memory://celery", options=app.conf.broker_transport_options) as broker:
            broker.publish_many(queue("coroutines"), messages)

    async with AsyncWorker(app, without_gossip=True, without_mingle=True):
        await asyncio.to_thread(publish)
        for id, value in (("one", 3), ("two", 1)):
            assert await Result(app.AsyncResult(id), Watcher(app)).get(LIMIT) == value
    assert datetime.now(UTC) > due


# ---------------------------------------------------------------------- results


async def test_results_are_values_lists_of_them_and_what_was_raised(app: Any) -> None:
    tasks = app.tasks
    add = tasks["c.add"]
    async with AsyncWorker(app, without_gossip=True, without_mingle=True):
        assert await (await apply(chain(add.s(1, 1), add.s(2), tasks["c.plain"].s()))).get(LIMIT) == 4
        assert await (await apply(group(add.s(n, n) for n in range(5)))).get(LIMIT) == [0, 2, 4, 6, 8]
        assert await (await apply(chord([add.s(n, n) for n in range(4)], tasks["c.total"].s()))).get(LIMIT) == 12
        with pytest.raises(ValueError, match="no value"):
            await (await adelay(tasks["c.fail"], "no value")).get(LIMIT)
        with pytest.raises(ValueError, match="in the chain"):
            await (await apply(chain(tasks["c.fail"].s("in the chain"), tasks["c.plain"].si(1)))).get(LIMIT)
        result = await adelay(add, 3, 4)
        assert await asyncio.gather(result, *(result.get(LIMIT) for _ in range(3))) == [7] * 4
        assert repr(result) == f"<Result {result.id}>"


async def test_waiting_ends_in_time(app: Any) -> None:
    result = await adelay(app.tasks["c.add"], 1, 2)
    with pytest.raises(TimeoutError):
        await result.get(0.05)


async def test_a_result_that_will_never_be_is_refused(app: Any) -> None:
    ignoring = await apply(app.tasks["c.add"].s(1, 2), ignore_result=True)
    with pytest.raises(bk.errors.ConfigError, match="ignores"):
        await ignoring
    none = build("memory://", "disabled://", broker_transport_options=app.conf.broker_transport_options)
    with pytest.raises(bk.errors.ConfigError, match="result_backend"):
        await (await adelay(none.tasks["c.add"], 1, 2))
    none.close()


async def test_eager_tasks_are_done_when_they_are_published(app: Any) -> None:
    app.conf.task_always_eager = True
    assert await (await adelay(app.tasks["c.add"], 1, 2)) == 3


async def test_a_backend_that_fails_is_asked_again(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(app)
    stock, failures = watcher._fetch, [OSError("away")] * 2

    def fetch(ids: set[str]) -> Any:
        if failures:
            raise failures.pop()
        return stock(ids)

    monkeypatch.setattr(watcher, "_fetch", fetch)
    id = secrets.token_hex(8)
    app.backend.store_result(id, 5, "SUCCESS")
    assert await Result(app.AsyncResult(id), watcher).get(LIMIT) == 5
    monkeypatch.setattr("brokerkit.celery._results.PATIENCE", 0)
    failures += [OSError("away")] * 100
    with pytest.raises(OSError, match="away"):
        await Result(app.AsyncResult("two"), watcher).get(LIMIT)


async def test_who_goes_away_while_something_is_published_leaves_the_thread_of_results_to_others() -> None:
    """A cancelled request of an async view: its event loop ends with it, and what it has begun comes back to nobody."""
    app = build("memory://", "rpc://", broker_transport_options={"prefix": f"{secrets.token_hex(3)}."})
    begun, over = threading.Event(), threading.Event()

    def wait(**_: object) -> None:
        begun.set()
        over.wait(LIMIT)

    async def go_away() -> None:
        asyncio.create_task(adelay(app.tasks["c.add"], 1, 2))  # noqa: RUF006  # which the end of the loop cancels
        assert await asyncio.to_thread(begun.wait, LIMIT)

    signals.before_task_publish.connect(wait)
    try:
        await asyncio.to_thread(asyncio.run, go_away())
    finally:
        signals.before_task_publish.disconnect(wait)
        over.set()
    async with asyncio.timeout(LIMIT):
        await adelay(app.tasks["c.add"], 3, 4)
    app.close()
    pools.reset()


async def test_who_waits_is_told_of_what_is_no_result(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(app)
    junk, id = secrets.token_hex(8), secrets.token_hex(8)
    app.backend.set(app.backend.get_key_for_task(junk), "[1]")
    with pytest.raises(TypeError):
        await Result(app.AsyncResult(junk), watcher).get(LIMIT)

    def end(ids: set[str]) -> Any:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "_fetch", end)
        with pytest.raises(RuntimeError, match="SystemExit"):
            await Result(app.AsyncResult(id), watcher).get(LIMIT)
    app.backend.store_result(id, 5, "SUCCESS")
    assert await Result(app.AsyncResult(id), watcher).get(LIMIT) == 5


async def test_messages_have_ids_of_their_own_and_not_those_of_their_tasks(app: Any) -> None:
    """A retry has the id of its task: it is another message, which nothing may take for the first one."""
    add = app.tasks["c.add"]
    for _ in range(2):
        await asyncio.to_thread(add.apply_async, (1, 2), task_id="one")
        await apply(add.s(1, 2), task_id="one")

    async def read(bridge: Bridge) -> list[bk.Stored[bytes]]:
        names = bridge.exchanges.names
        return [message async for message in bridge.broker.browse(names.queue("coroutines"), limit=10)]

    def read_all() -> list[bk.Stored[bytes]]:
        with app.connection_for_read() as connection:
            bridge: Bridge = connection.default_channel.bridge
            return bridge.call(read, bridge)

    messages = await asyncio.to_thread(read_all)
    assert [json.loads(message.value)["headers"]["id"] for message in messages] == ["one"] * 4
    ids = {message.id for message in messages}
    assert len(ids) == 4
    assert "one" not in ids
