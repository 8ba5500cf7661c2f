"""The parts of the benchmarks: one for each message system."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace

from .frame import Backend, Row, Work
from .probes import Probe


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured on one message system."""

    name: str
    backend: Backend
    plan: Callable[[], Sequence[tuple[Work, Sequence[type[Row]]]]]
    probes: tuple[Probe, ...]
    libraries: tuple[str, ...]
    """What is measured with; their versions are printed."""
    others: Callable[[], Sequence[str]] = tuple
    """What else there is to say about versions."""


def memory() -> Bench:
    """Return the part on memory."""
    from . import probes
    from .memory import MEMORY, plan

    libraries = ("faststream", "taskiq")
    return Bench(name="memory", backend=MEMORY, plan=plan, probes=probes.ALL, libraries=libraries)


def redis() -> Bench:
    """Return the part on Redis."""
    from .on_redis import arq, server
    from .on_redis.plan import plan
    from .on_redis.probes import ALL

    libraries = ("redis", "hiredis", "faststream", "taskiq", "taskiq-redis", "streaq", "coredis")
    return Bench(
        name="redis",
        backend=server.REDIS,
        plan=plan,
        probes=ALL,
        libraries=libraries,
        others=lambda: (server.version(), arq.version()),
    )


def kafka() -> Bench:
    """Return the part on Kafka."""
    from .on_kafka import server
    from .on_kafka.plan import plan
    from .on_kafka.probes import ALL

    libraries = ("aiokafka", "kio", "confluent-kafka", "faststream", "taskiq", "taskiq-aio-kafka")
    return Bench(
        name="kafka",
        backend=server.KAFKA,
        plan=plan,
        probes=ALL,
        libraries=libraries,
        others=lambda: (server.version(),),
    )


def celery() -> Bench:
    """Return the part on Celery, which is the same for all that carries its messages."""
    from .on_celery import server
    from .on_celery.plan import plan
    from .on_celery.probes import ALL
    from .on_kafka import server as on_kafka
    from .on_redis import server as on_redis

    return Bench(
        name="celery",
        backend=server.BOTH,
        plan=plan,
        probes=ALL,
        libraries=("celery", "kombu", "redis", "hiredis", "confluent-kafka", "aiokafka", "kio"),
        others=lambda: (on_redis.version(), on_kafka.version()),
    )


BENCHES = {"memory": memory, "redis": redis, "kafka": kafka, "celery": celery}


def chosen(
    names: Iterable[str], only: Sequence[str], rows: Sequence[str]
) -> list[tuple[Bench, list[tuple[Work, Sequence[type[Row]]]], list[Probe]]]:
    """Return the parts called *names* with the works and probes of *only*, and of those works the rows of *rows*.

    Empty means all; a row is kept too where others are shown against it, or have it in a goal.
    """
    made = []
    for name in names:
        bench = BENCHES[name]()
        plan = bench.plan()
        known = {work.name for work, _ in plan} | {probe.name for probe in bench.probes}
        works: list[tuple[Work, Sequence[type[Row]]]] = []
        for work, all_rows in plan:
            if _wanted(work.name, only, known):
                against = {work.yardstick, *(goal.than for goal in work.goals)}
                kept = [row for row in all_rows if row.name in against or _wanted(row.name, rows, ())]
                here = {row.name for row in kept}
                works.append((replace(work, goals=tuple(goal for goal in work.goals if goal.row in here)), kept))
        made.append((bench, works, [probe for probe in bench.probes if _wanted(probe.name, only, known)]))
    return made


def _wanted(name: str, parts: Sequence[str], known: Container[str]) -> bool:
    # The whole name of one means that one, and not others that contain it too.
    return not parts or any(part == name or (part in name and part not in known) for part in parts)
