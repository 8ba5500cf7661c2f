"""What is measured on Kafka, and what is to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ..frame import Goal, Row, Work
from ..job import RATE
from .limit import Confluent
from .ours import OurQueue, OurQueueDefault, OurQueueShort, Ours, OursDefault
from .peers import FastStream, FastStreamBatch, FastStreamFirst, Taskiq, TaskiqConsuming
from .raw import Raw, RawAutomatic, RawEach, RawSafe, RawSend, RawTyped

KEYS: Final = 200
QUEUE_PARTITIONS: Final = 4
"""As many as a queue has by default where there are share groups; the topics of all others have so many, too."""
MOST: Final = 300_000
PARTITIONS: Final = 8
Plan = list[tuple[Work, Sequence[type[Row]]]]


def plan() -> Plan:
    """Return what is measured on Kafka."""
    return [*_publishing(), *_consuming(), _latency(), *_queues()]


def _goal(factor: float) -> tuple[Goal, ...]:
    return (Goal(row=Ours.name, than=Raw.name, factor=factor),)


def _publishing() -> Plan:
    raw, peers = (Raw, RawTyped, RawSafe, Confluent), (FastStream, Taskiq)
    one = Work(
        name="publish-1",
        title="one task awaits each publish",
        backend="kafka",
        yardstick="raw",
        stores=True,
        keys=KEYS,
        most=MOST,
        goals=_goal(0.9),
    )
    tasks = Work(
        name="publish-100",
        title="100 tasks await each publish, without keys, one partition",
        backend="kafka",
        yardstick="raw",
        stores=True,
        handlers=100,
        keys=KEYS,
        most=MOST,
        goals=_goal(1.5),
    )
    keyed = Work(
        name="publish-100-keyed",
        title=f"100 tasks await each publish, {KEYS} keys, {PARTITIONS} partitions",
        backend="kafka",
        yardstick="raw",
        stores=True,
        handlers=100,
        keyed=True,
        keys=KEYS,
        partitions=PARTITIONS,
        most=MOST,
        goals=_goal(1.5),
    )
    many = Work(
        name="publish-many",
        title="1000 messages in one call",
        backend="kafka",
        yardstick="raw",
        stores=True,
        batch=1000,
        keys=KEYS,
        most=MOST,
        goals=_goal(0.8),
    )
    return [
        (one, (*raw, Ours, *peers)),
        (tasks, (*raw, Ours, *peers)),
        (keyed, (*raw, Ours, FastStream)),  # taskiq's broker knows no keys
        (many, (*raw, RawSend, Ours, *peers)),
    ]


def _consuming() -> Plan:
    one = Work(
        name="consume-1",
        title="a stored backlog, one partition, handlers one by one",
        backend="kafka",
        yardstick="raw",
        keys=KEYS,
        most=MOST,
        goals=_goal(0.5),
    )
    tasks = Work(
        name="consume-100",
        title=f"a stored backlog of {KEYS} keys, one partition, 100 handlers at once; ours in order per key",
        backend="kafka",
        yardstick="raw",
        handlers=100,
        keyed=True,
        keys=KEYS,
        most=MOST,
        goals=_goal(0.6),
    )
    spread = Work(
        name="consume-100-spread",
        title=f"a stored backlog of {KEYS} keys, {PARTITIONS} partitions, 100 handlers at once; ours in order per key",
        backend="kafka",
        yardstick="raw",
        handlers=100,
        keyed=True,
        keys=KEYS,
        partitions=PARTITIONS,
        most=MOST,
        goals=_goal(0.6),
    )
    raw, ours, peers = (Raw, RawTyped), (Ours, OursDefault), (FastStream, FastStreamFirst, TaskiqConsuming)
    return [
        (one, (*raw, RawEach, RawAutomatic, Confluent, *ours, *peers, FastStreamBatch)),
        (tasks, (*raw, RawAutomatic, Confluent, *ours, *peers)),
        (spread, (*raw, Confluent, *ours, *peers)),
    ]


def _latency() -> tuple[Work, Sequence[type[Row]]]:
    limits: tuple[tuple[float, Literal["p50", "p99"]], ...] = ((1.3, "p50"), (2.0, "p99"))
    work = Work(
        name="latency",
        title=f"from before publish to the handler, {RATE} messages a second between two processes",
        backend="kafka",
        yardstick="raw",
        metric="latency",
        handlers=100,
        keys=KEYS,
        longer=8,
        goals=tuple(
            Goal(row=Ours.name, than=Raw.name, factor=factor, quantile=quantile) for factor, quantile in limits
        ),
    )
    return work, (Raw, RawTyped, RawSafe, Confluent, Ours, FastStream, Taskiq)


def _queues() -> Plan:
    backlog = Work(
        name="queue-100",
        title="a stored backlog, 100 handlers at once; ours a queue on a share group, an acknowledgement per message",
        backend="kafka",
        yardstick="raw",
        handlers=100,
        keys=KEYS,
        partitions=QUEUE_PARTITIONS,
        most=MOST,
        goals=(
            Goal(row=OurQueue.name, than=Raw.name, factor=0.25),
            Goal(row=OurQueue.name, than=FastStream.name, factor=8.0),
        ),
    )
    limits: tuple[tuple[float, Literal["p50", "p99"]], ...] = ((3.5, "p50"), (6.0, "p99"))
    latency = Work(
        name="queue-latency",
        title=f"from before publish to the handler, {RATE} messages a second between two processes; raw and brokerkit a topic",
        backend="kafka",
        yardstick="raw",
        metric="latency",
        handlers=100,
        keys=KEYS,
        partitions=QUEUE_PARTITIONS,
        longer=8,
        goals=tuple(
            Goal(row=OurQueue.name, than=Raw.name, factor=factor, quantile=quantile) for factor, quantile in limits
        ),
    )
    return [
        (backlog, (Raw, RawTyped, RawEach, OurQueue, OurQueueShort, OurQueueDefault, FastStream)),
        (latency, (Raw, RawSafe, Ours, OurQueue, OurQueueDefault, FastStream)),
    ]
