"""The harness with real workers: a program that loses a task or executes it twice shows no figure."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from ...servers.kafka import shared_kafka
from ..frame import Results, Row, Work, measure
from ..on_kafka.server import wire
from ..on_redis import server as on_redis
from ..table import judge
from . import probes, rows, toys
from .plan import plan
from .probes import Life
from .server import NAME
from .worker import working

FEW = 40
DELAY = Work(name="delay", title="", backend="celery", stores=True)
ADELAY = Work(name="adelay", title="", backend="celery", stores=True, handlers=10)
PREFORK = Work(name="prefork-2", title="", backend="celery")
SOLO = Work(name="solo", title="", backend="celery")
THREADS = Work(name="threads-8", title="", backend="celery")
LATENCY = Work(name="latency", title="", backend="celery", metric="latency")


@pytest.fixture(scope="module")
def urls() -> Iterator[str]:
    kafka = shared_kafka().url()
    with on_redis.serve() as redis:
        yield f"{redis} {kafka}"
    with wire(kafka) as admin:
        own = f"{NAME}{os.getpid()}-"  # other processes of this run measure on the same broker
        admin.delete([name for name in admin.cluster(None).topics if own in name])


HONEST: list[tuple[type[Row], Work]] = [
    *((row, DELAY) for row in (rows.StockRedis, rows.StockKafka, rows.OurRedis, rows.OurKafka)),
    *((row, ADELAY) for row in (rows.AsyncRedis, rows.AsyncKafka)),
    (rows.StockRedis, PREFORK),
    (rows.StockKafka, SOLO),
    *((rows.OurRedis, work) for work in (PREFORK, THREADS)),
    *((rows.OurKafka, work) for work in (PREFORK, SOLO)),
]


@pytest.mark.parametrize("row, work", HONEST, ids=lambda one: one.name)
def test_an_honest_row_has_figures(row: type[Row], work: Work, urls: str) -> None:
    figures = measure(row, work, FEW, urls)
    assert figures.flaw() is None
    assert figures.handled == FEW
    assert figures.rate > 0
    assert figures.cpu > 0 or not work.stores  # so few may be executed at one go


MISBEHAVING: list[tuple[type[Row], Work, str]] = [
    (toys.StockRedisKeeps, DELAY, "1 lost, 1 double"),
    (toys.StockKafkaDoubles, DELAY, "1 double"),
    (toys.OurRedisLoses, ADELAY, "1 lost"),
    (toys.OurKafkaKeeps, DELAY, "1 lost, 1 double"),
    (toys.OurRedisDoubles, PREFORK, "1 double"),
    (toys.StockRedisLeaves, SOLO, "1 unsettled"),
    (toys.OurRedisLeaves, SOLO, "1 unsettled"),
]


@pytest.mark.parametrize("row, work, flaw", MISBEHAVING)
def test_a_row_that_misbehaves_has_a_flaw(row: type[Row], work: Work, flaw: str, urls: str) -> None:
    assert measure(row, work, FEW, urls).flaw() == f"{flaw} of {FEW}"


def test_a_row_that_executes_too_few_is_given_up(urls: str) -> None:
    figures = measure(toys.OurRedisLoses, SOLO, FEW, urls, limit=15.0)
    assert figures.flaw() == f"not done after 15 s, {FEW - 1} of {FEW} handled"


@pytest.mark.parametrize("row", [rows.StockRedis, rows.OurKafka])
def test_latency_is_that_between_two_processes(row: type[Row], urls: str) -> None:
    figures = measure(row, LATENCY, FEW, urls)
    assert figures.flaw() is None
    assert figures.p50 is not None
    assert figures.p99 is not None
    assert 0 < figures.p50 <= figures.p99


def test_each_goal_is_between_rows_of_its_work() -> None:
    works = plan()
    results = Results(works)
    for work, all_rows in works:
        names = [row.name for row in all_rows]
        assert len(set(names)) == len(names)
        assert work.yardstick in names
        for goal in work.goals:
            assert {goal.row, goal.than} <= set(names)
            assert judge(results, work, goal)[0] is False  # what was not measured is not reached


def test_all_that_the_goals_ask_for_is_measured() -> None:
    goals = {
        (work.name, goal.row, goal.factor, goal.than, goal.quantile if work.metric == "latency" else None)
        for work, _ in plan()
        for goal in work.goals
    }
    stock, redis, kafka = "stock-redis", "brokerkit-redis", "brokerkit-kafka"
    assert goals == {
        ("delay", redis, 1.1, stock, None),
        ("delay", kafka, 0.75, stock, None),
        ("delay", kafka, 1.0, "stock-kafka", None),
        ("adelay", "adelay-redis", 2.0, stock, None),
        ("adelay", "adelay-kafka", 2.0, stock, None),
        *((f"prefork-{number}", row, 1.6, stock, None) for number in (1, 2) for row in (redis, kafka)),
        ("solo", redis, 2.6, stock, None),
        ("solo", kafka, 2.6, stock, None),
        ("threads-8", redis, 3.0, stock, None),
        ("threads-8", kafka, 2.5, stock, None),
        *(("latency", redis, 1.0, stock, quantile) for quantile in ("p50", "p99")),
        *(("latency", kafka, 1.3, stock, quantile) for quantile in ("p50", "p99")),
    }


def test_a_life_is_compared_within_each_round() -> None:
    def lives(*factors: float) -> list[Life]:
        return [Life(first=factor, cpu=factor / 10, memory=100 * factor, stop=2 * factor) for factor in factors]

    measured = {
        rows.StockRedis: lives(1.0, 2.0, 4.0),
        rows.StockKafka: lives(1.0, 1.0, 1.0),
        rows.OurRedis: lives(1.1, 2.2, 4.4),
        rows.OurKafka: lives(1.7, 3.4, 6.8),
    }
    found = list(probes.judged(measured))
    assert [one.value for one in found if one.name.endswith(rows.OurRedis.name)] == [pytest.approx(1.1)] * 4
    reached = {
        one.name.partition(",")[0].split()[0]: one.reached for one in found if one.name.endswith("brokerkit-redis")
    }
    assert reached == {"from": False, "CPU": True, "memory": True, "warm": False}
    assert not any(one.reached for one in found if one.name.endswith(rows.OurKafka.name))


def test_a_worker_that_cannot_start_says_why() -> None:
    async def main() -> None:
        async with working("nothing://", "bench", ("-P", "solo")) as worker:
            with pytest.raises(OSError, match=r"the worker has ended with 1: .*nothing"):
                await worker.ready()

    asyncio.run(main())
