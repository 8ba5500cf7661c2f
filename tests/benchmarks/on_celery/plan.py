"""What is measured of Celery, and what is to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ..frame import Goal, Row, Work
from ..job import RATE
from .rows import POOLS, AsyncKafka, AsyncRedis, OurKafka, OurRedis, Program, StockKafka, StockRedis

Plan = list[tuple[Work, Sequence[type[Row]]]]
ALL: Final[tuple[type[Row], ...]] = (StockRedis, StockKafka, OurRedis, OurKafka)
PUBLISHED: Final = 5_000
EXECUTED: Final = 20_000


def plan() -> Plan:
    """Return what is measured of Celery."""
    return [*_publishing(), *_working(), _latency()]


def _goal(row: type[Program], factor: float, than: type[Program] = StockRedis) -> Goal:
    return Goal(row=row.name, than=than.name, factor=factor)


def _publishing() -> Plan:
    delay = Work(
        name="delay",
        title="delay(), one thread; each returns when its task is stored",
        backend="celery",
        yardstick=StockRedis.name,
        stores=True,
        exactly=PUBLISHED,
        goals=(_goal(OurRedis, 1.1), _goal(OurKafka, 0.75), _goal(OurKafka, 1.0, StockKafka)),
    )
    adelay = Work(
        name="adelay",
        title="50 tasks await adelay(), beside delay() of one thread",
        backend="celery",
        yardstick=StockRedis.name,
        handlers=50,
        stores=True,
        exactly=PUBLISHED,
        goals=(_goal(AsyncRedis, 2.0), _goal(AsyncKafka, 2.0)),
    )
    return [(delay, ALL), (adelay, (StockRedis, StockKafka, AsyncRedis, AsyncKafka))]


def _working() -> Plan:
    works: Plan = []
    factors = {"prefork-1": (1.6, 1.6), "prefork-2": (1.6, 1.6), "solo": (2.6, 2.6), "threads-8": (3.0, 2.5)}
    for name, (redis, kafka) in factors.items():
        work = Work(
            name=name,
            title=f"a worker executes stored tasks, its results ignored: celery worker {' '.join(POOLS[name])}",
            backend="celery",
            yardstick=StockRedis.name,
            exactly=EXECUTED,
            goals=(_goal(OurRedis, redis), _goal(OurKafka, kafka)),
        )
        # Kombu's transport for Kafka comes to a halt with a pool of threads: one of them waits for what another one polls.
        works.append((work, tuple(row for row in ALL if (name, row) != ("threads-8", StockKafka))))
    return works


def _latency() -> tuple[Work, Sequence[type[Row]]]:
    quantiles: tuple[Literal["p50", "p99"], ...] = ("p50", "p99")
    work = Work(
        name="latency",
        title=f"from before delay() to the task's first line, {RATE} tasks a second: celery worker {' '.join(POOLS['latency'])}",
        backend="celery",
        metric="latency",
        yardstick=StockRedis.name,
        longer=8,
        goals=tuple(
            Goal(row=row.name, than=StockRedis.name, factor=factor, quantile=quantile)
            for row, factor in ((OurRedis, 1.0), (OurKafka, 1.3))
            for quantile in quantiles
        ),
    )
    return work, ALL
