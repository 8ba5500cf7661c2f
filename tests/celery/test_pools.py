"""Every pool of the worker, processes that come and go, and what is changed while it runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .conftest import Hire
from .systems import LEASE
from .workers import PATIENCE, Crew

feature = pytest.mark.feature


def works(crew: Crew, count: int = 30) -> None:
    """Check that tasks run once each, and that their results come."""
    results = [crew.send("add", number, number) for number in range(count)]
    assert [result.get(timeout=30 * PATIENCE) for result in results] == [2 * number for number in range(count)]
    assert set(crew.runs(result.id for result in results).values()) == {1}


@feature("tasks")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_every_pool_runs_tasks_once_and_in_time(hire: Hire, pool: str) -> None:
    crew = hire()
    (worker,) = crew.start("one", pool=pool, concurrency=2)
    works(crew)
    begin = time.monotonic()
    assert crew.send("again", 1, 0.5).get(timeout=30) == 1
    assert time.monotonic() - begin >= 0.5
    answer = crew.app.control.inspect(timeout=10 * PATIENCE, limit=1).ping()
    assert answer == {"one@test": {"ok": "pong"}}
    worker.stop()


def test_leases_are_renewed_while_a_pool_without_processes_is_busy(hire: Hire) -> None:
    crew = hire(options={"lease": LEASE})
    crew.start("one", "two", pool="solo", concurrency=1)
    sent = [crew.send("late_nap", 2 * LEASE).id for _ in range(2)]
    crew.ended(*sent, timeout=4 * LEASE + 15)
    assert set(crew.runs(sent).values()) == {1}


@feature("recycle")
@pytest.mark.parametrize("pool", ["prefork"])
def test_processes_are_replaced_after_some_tasks(hire: Hire, pool: str) -> None:
    crew = hire()
    crew.start("one", pool=pool, options=["--max-tasks-per-child", "10"])
    results = [crew.send("process") for _ in range(80)]
    processes = [result.get(timeout=60 * PATIENCE) for result in results]
    assert len(set(processes)) >= 8
    assert max(processes.count(each) for each in set(processes)) <= 10
    assert set(crew.runs(result.id for result in results).values()) == {1}


def test_processes_of_the_pool_may_be_spawned(hire: Hire) -> None:
    # A fresh interpreter has to be told where the tasks are.
    crew = hire(worker_pool_start_method="spawn", imports=["tests.celery.apps.main"])
    (worker,) = crew.start("one")
    works(crew)
    worker.stop()


@feature("prefetch")
def test_a_worker_fetches_what_it_may_and_more_when_its_pool_grows(hire: Hire, gate: Path) -> None:
    crew = hire(worker_prefetch_multiplier=3)
    crew.start("one", concurrency=1, options=["-Q", "a,b"])
    sent = [crew.send("late_until", str(gate), queue="ab"[number % 2]).id for number in range(14)]

    def settles_at(count: int) -> None:
        crew.until(lambda: sum(bool(crew.of(id, "received")) for id in sent) >= count, 15, f"{count} are not fetched")
        time.sleep(0.7)
        assert sum(bool(crew.of(id, "received")) for id in sent) == count

    settles_at(3)
    wait = {"reply": True, "timeout": 10 * PATIENCE, "limit": 1}
    crew.app.control.pool_grow(1, **wait)
    settles_at(6)
    gate.touch()
    crew.ended(*sent, timeout=30)
    assert set(crew.runs(sent).values()) == {1}


@feature("prefetch")
def test_a_pool_grows_with_its_work_and_shrinks_without(hire: Hire, gate: Path) -> None:
    crew = hire(worker_prefetch_multiplier=1)
    (worker,) = crew.start("one", options=["--autoscale=4,1"], environment={"AUTOSCALE_KEEPALIVE": "1"})
    sent = [crew.send("until", str(gate)).id for _ in range(8)]
    crew.until(lambda: sum(bool(crew.of(id, "began")) for id in sent) == 4, 20, "four do not run at a time")
    gate.touch()
    crew.ended(*sent, timeout=30)
    crew.until(lambda: len(worker.children()) <= 2, 20, lambda: f"{worker.children()} are left")
    works(crew, 5)


@feature("queues")
def test_a_worker_serves_several_queues_without_delay(hire: Hire) -> None:
    crew = hire()
    crew.start("one", options=["-Q", "a,b,c"])
    for _ in range(5):
        for queue in "abc":
            assert crew.send("add", 1, 1, queue=queue).get(timeout=5 * PATIENCE) == 2


@feature("time_limits")
@pytest.mark.parametrize("pool", ["prefork"])
def test_a_task_that_exceeds_its_time_is_ended(hire: Hire, pool: str) -> None:
    crew = hire()
    crew.start("one", pool=pool)
    hard = crew.send("nap", 60, time_limit=1)
    soft = crew.send("nap", 60, soft_time_limit=1)
    for result, name in ((hard, "TimeLimitExceeded"), (soft, "SoftTimeLimitExceeded")):
        crew.until(lambda result=result: result.ready(), 20, "it runs on")  # type: ignore[misc]
        assert result.state == "FAILURE"
        assert type(result.result).__name__ == name
    works(crew, 5)


@feature("neighbours")
def test_workers_find_each_other(hire: Hire) -> None:
    crew = hire()
    (first,) = crew.start("one", level="DEBUG")
    (second,) = crew.start("two", level="DEBUG")
    crew.until(lambda: "mingle: sync complete" in second.text(), 10, lambda: second.text()[-2000:])
    crew.until(lambda: "two@test joined the party" in first.text(), 20, lambda: first.text()[-2000:])
    second.stop()
    crew.until(lambda: "two@test left" in first.text(), 20, lambda: first.text()[-2000:])


@feature("broadcast")
def test_a_broadcast_reaches_every_worker_once(hire: Hire) -> None:
    crew = hire(broadcast="announcements")
    crew.start("one", "two", concurrency=1)
    sent = crew.send("nap", queue="announcements").id
    crew.ended(sent, count=2, timeout=20)
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    assert sorted(entry.by for entry in crew.of(sent, "began")) == ["one@test", "two@test"]


def test_results_come_over_the_broker_itself(hire: Hire) -> None:
    crew = hire(backend="rpc://")
    crew.start("one")
    works(crew)
    with pytest.raises(ValueError, match="as it should"):
        crew.send("fail").get(timeout=20 * PATIENCE)


@feature("priority")
def test_more_urgent_tasks_run_first(hire: Hire, request: pytest.FixtureRequest) -> None:
    crew = hire(worker_prefetch_multiplier=1)
    priorities = [0, 3, 6, 9, 6, 3, 0, 9]
    sent = [crew.send("nap", priority=priority).id for priority in priorities]
    (worker,) = crew.start("one", concurrency=1)
    crew.ended(*sent, timeout=20)
    order = sorted(range(len(sent)), key=lambda index: crew.of(sent[index], "began")[0].at)
    if request.node.callspec.params["system"] == "kafka":
        assert sum("priorit" in line and "WARNING" in line for line in worker.text().splitlines()) <= 1
        assert set(crew.runs(sent).values()) == {1}
    else:
        assert [priorities[index] for index in order] == sorted(priorities, reverse=True)
