"""Tasks that are coroutines, under each pool of a real ``celery worker``."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import chain, chord, group
from celery.exceptions import MaxRetriesExceededError, SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from kombu import pools

from brokerkit.celery._tasks import body, is_async

from ..servers import ADMIN, RedisServer
from .apps.coroutines import VARIABLE, build
from .workers import PATIENCE, ROOT

POOLS = ("prefork", "threads", "solo", "gevent", "async")
LIMIT = 15 * PATIENCE
pytestmark = pytest.mark.feature("async_tasks", system="redis")


class Hired:
    """An application, and one worker of it."""

    def __init__(self, app: Any, pool: str) -> None:
        self.app = app
        self.pool = pool

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        """Return what a task returns."""
        return self.send(name, *args, **options).get(timeout=LIMIT)

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.tasks[f"c.{name}"].apply_async(args, **options)

    def s(self, name: str, *args: Any) -> Any:
        return self.app.tasks[f"c.{name}"].s(*args)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module", params=POOLS)
def hired(
    request: pytest.FixtureRequest, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hired]:
    pool = request.param
    settings: dict[str, Any] = {
        "broker": redis.url(),
        "backend": redis.url(user=ADMIN, database=1),
        "config": {"broker_transport_options": {"prefix": f"{secrets.token_hex(3)}."}},
    }
    app = build(settings["broker"], settings["backend"], **settings["config"])
    app.set_current()
    log = tmp_path_factory.mktemp("worker") / "log"
    name = {"async": "brokerkit"}.get(pool, pool)
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.apps.coroutines", "worker", "-n", f"{pool}@test"]
    command += ["-P", name, "-c", "2" if pool == "prefork" else "20", "--without-gossip", "--without-mingle"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CELERY"))}
    environment = {**kept, VARIABLE: msgspec.json.encode(settings).decode(), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield Hired(app, pool)
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.terminate()
        try:
            process.wait(20 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        app.backend.result_consumer.stop()
        app.close()
        pools.reset()


@pytest.fixture
def pool(hired: Hired) -> str:
    return hired.pool


def each(*pools: str) -> pytest.MarkDecorator:
    """Return a mark that runs a test for *pools*, each with its column of the tables."""
    return pytest.mark.parametrize("hired, pool", [(pool, pool) for pool in pools], indirect=["hired"], scope="module")


@each(*POOLS)
def test_a_coroutine_returns_its_value_on_one_loop_per_process(hired: Hired, pool: str) -> None:
    assert hired("add", 2, 3) == 5
    loops = {tuple(result) for result in group(hired.s("loop") for _ in range(20))().get(timeout=LIMIT)}
    assert len(loops) == len({pid for pid, _, _ in loops})


@each(*POOLS)
def test_self_request_is_the_tasks_own_among_others(hired: Hired, pool: str) -> None:
    assert group(hired.s("who", 0.05) for _ in range(8))().get(timeout=LIMIT) == [True] * 8


@each(*POOLS)
def test_retries(hired: Hired, pool: str) -> None:
    assert hired("again", 2) == 2
    with pytest.raises(MaxRetriesExceededError):
        hired("again", 3)
    assert hired("give_up") == "gave up"
    assert hired("recover") == 2


@each(*POOLS)
def test_chains_and_chords(hired: Hired, pool: str) -> None:
    assert chain(hired.s("add", 1, 1), hired.s("add", 2), hired.s("plain"))().get(timeout=LIMIT) == 4
    assert chord([hired.s("add", n, n) for n in range(4)], hired.s("total"))().get(timeout=LIMIT) == 12
    with pytest.raises(ValueError, match="no value"):
        hired("fail", "no value")


@each(*POOLS)
def test_a_coroutine_that_exits_ends_no_other(hired: Hired, pool: str) -> None:
    assert hired("exits") == "went on"
    assert hired("add", 2, 3) == 5


@each(*POOLS)
def test_a_soft_limit_is_raised_in_the_coroutine(hired: Hired, pool: str) -> None:
    assert hired("softly", "catch").startswith("cleaned up")
    assert hired("softly", "group").startswith("cleaned up")
    with pytest.raises(SoftTimeLimitExceeded):
        hired("softly", "raise")


@each(*POOLS)
def test_a_hard_limit_ends_a_task(hired: Hired, pool: str, tmp_path: Path) -> None:
    history = tmp_path / "history"
    with pytest.raises(TimeLimitExceeded):
        hired("limited", str(history))
    if pool != "prefork":  # which ends the process
        assert history.read_text() == "began\ncancelled\n"


@each("prefork", "gevent", "async")
def test_revoking_with_terminate_ends_a_running_task(hired: Hired, pool: str, tmp_path: Path) -> None:
    history = tmp_path / "history"
    result = hired.send("long", str(history))
    until(history.exists)
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=LIMIT)
    if pool != "prefork":  # which ends the process
        until(lambda: history.read_text() == "began\ncancelled\n")
    assert hired("add", 1, 1) == 2


@each(*POOLS)
def test_tasks_call_tasks(hired: Hired, pool: str) -> None:
    assert hired("nested") == [3, 3]
    if pool != "solo":  # which has no room for the child
        mine, parent, root, known = hired("publishes")
        assert (parent, root, known) == (mine, mine, True)


@each(*POOLS)
def test_tasks_that_are_shared_between_applications(hired: Hired, pool: str) -> None:
    assert hired.app.tasks["tests.celery.apps.coroutines.shared"].delay(7).get(timeout=LIMIT) == 7


@each("threads", "gevent", "async")
def test_many_run_at_once(hired: Hired, pool: str) -> None:
    begin = time.monotonic()
    group(hired.s("nap", 0.5) for _ in range(20))().get(timeout=LIMIT)
    assert time.monotonic() - begin < 5 * PATIENCE


def until(held: Any) -> None:
    end = time.monotonic() + LIMIT
    while not held():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------------- without a worker


async def plus(x: int, y: int = 1) -> int:
    """Add."""
    await asyncio.sleep(0)
    return x + y


def test_a_body_is_made_once_and_looks_like_its_function() -> None:
    made: Any = body(plus)
    assert body(plus) is made
    assert (made.__name__, made.__doc__) == ("plus", "Add.")
    assert list(inspect.signature(made).parameters) == ["x", "y"]


def test_calling_a_task_gives_its_value_and_where_a_loop_runs_its_coroutine() -> None:
    app = build("memory://", "cache+memory://")
    add = app.tasks["c.add"]
    assert is_async(add) and not is_async(app.tasks["c.plain"])
    assert add(1, 2) == 3

    async def main() -> int:
        value: int = await add(3, 4)
        return value

    assert asyncio.run(main()) == 7


def test_arguments_are_checked_when_a_task_is_published() -> None:
    app = build("memory://", "cache+memory://")
    with pytest.raises(TypeError, match="argument"):
        app.tasks["c.add"].delay(1)


def test_eager_tasks_run_in_place_and_say_so_where_they_would_wait_for_themselves() -> None:
    app = build("memory://", "cache+memory://", task_always_eager=True)
    assert app.tasks["c.add"].delay(1, 2).get() == 3
    assert app.tasks["c.again"].delay(2).get() == 2

    async def calls() -> object:
        return app.tasks["c.add"].apply((1, 2)).get(disable_sync_subtasks=False)

    app.task(name="calls")(calls)
    app.finalize()
    with pytest.raises(RuntimeError, match="adelay"):
        app.tasks["calls"].apply().get()
