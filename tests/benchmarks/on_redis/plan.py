"""What is measured on Redis, and what is to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ..frame import Goal, Row, Work
from ..job import RATE
from ..on_servers.ours import OurQueue, OurTopic
from .arq import Arq, ArqDefault
from .ours import (
    DeepQueue,
    DeepTopic,
    OurQueueBytes,
    OurQueueDefault,
    OurTopicBytes,
    ShallowQueue,
    ShallowTopic,
)
from .peers import FastStreamList, FastStreamStream, Streaq, TaskiqList, TaskiqStream
from .raw import Raw, RawBatchAck, RawBytes, RawList, RawListBytes, RawListTyped, RawTyped
from .wire import HiredisSocket

KEYS: Final = 200
MOST: Final = 300_000
PEERS: Final[tuple[type[Row], ...]] = (FastStreamStream, FastStreamList, TaskiqStream, TaskiqList, Streaq, Arq)
Plan = list[tuple[Work, Sequence[type[Row]]]]


def plan() -> Plan:
    """Return what is measured on Redis."""
    return [*_publishing(), *_consuming(), _latency(), *_deep()]


def _goals(factor: float, than: type[Row], *rows: type[Row]) -> tuple[Goal, ...]:
    return tuple(Goal(row=row.name, than=than.name, factor=factor) for row in rows)


def _publishing() -> Plan:
    typed, as_bytes = (OurQueue, OurTopic), (OurQueueBytes, OurTopicBytes)
    ours, raw = (*typed, *as_bytes), (Raw, RawTyped, RawBytes)
    one = Work(
        name="publish-1",
        title="one task awaits each publish",
        backend="redis",
        yardstick="raw",
        stores=True,
        keys=KEYS,
        most=MOST,
        goals=_goals(1.0, Raw, *typed),
    )
    tasks = Work(
        name="publish-100",
        title="100 tasks await each publish",
        backend="redis",
        yardstick="raw",
        stores=True,
        handlers=100,
        keys=KEYS,
        most=MOST,
        goals=(*_goals(4.5, Raw, *typed), *_goals(6.0, Raw, *as_bytes)),
    )
    many = Work(
        name="publish-many",
        title="100 messages in one call",
        backend="redis",
        yardstick="raw-list",
        stores=True,
        batch=100,
        keys=KEYS,
        most=MOST,
        goals=_goals(1.0, RawList, *typed),
    )
    lists = (RawList, RawListTyped, RawListBytes)
    return [
        (one, (*raw, RawList, HiredisSocket, *ours, *PEERS)),
        (tasks, (*raw, RawList, HiredisSocket, *ours, *PEERS)),
        (many, (*lists, *raw, HiredisSocket, *ours, *PEERS)),
    ]


def _consuming() -> Plan:
    one = Work(
        name="queue-1",
        title="a stored backlog, handlers one by one, an acknowledgement per message",
        backend="redis",
        yardstick="raw",
        keys=KEYS,
        most=MOST,
        goals=_goals(4.0, Raw, OurQueue),
    )
    many = Work(
        name="queue-100",
        title="a stored backlog, 100 handlers at once, an acknowledgement per message",
        backend="redis",
        yardstick="raw",
        handlers=100,
        keys=KEYS,
        most=MOST,
        goals=_goals(5.0, Raw, OurQueue),
    )
    topic = Work(
        name="topic-100",
        title=f"a stored backlog of {KEYS} keys, a group with 100 handlers at once; ours in order per key",
        backend="redis",
        yardstick="raw",
        handlers=100,
        keyed=True,
        keys=KEYS,
        most=MOST,
        goals=_goals(5.0, Raw, OurTopic),
    )
    raw = (Raw, RawTyped, RawBatchAck, RawList, HiredisSocket)
    return [
        (one, (*raw, OurQueue, OurQueueDefault, *PEERS)),
        (many, (*raw, OurQueue, OurQueueDefault, *PEERS, ArqDefault)),
        (topic, (Raw, RawTyped, RawBatchAck, HiredisSocket, OurTopic, FastStreamStream, TaskiqStream)),
    ]


def _latency() -> tuple[Work, Sequence[type[Row]]]:
    limits: tuple[tuple[float, Literal["p50", "p99"]], ...] = ((1.2, "p50"), (1.5, "p99"))
    work = Work(
        name="latency",
        title=f"from before publish to the handler, {RATE} messages a second between two processes",
        backend="redis",
        yardstick="raw",
        metric="latency",
        handlers=100,
        keys=KEYS,
        longer=8,
        goals=tuple(
            Goal(row=row.name, than=Raw.name, factor=factor, quantile=quantile)
            for row in (OurQueue, OurTopic)
            for factor, quantile in limits
        ),
    )
    return work, (Raw, RawTyped, RawList, HiredisSocket, OurQueue, OurTopic, *PEERS, ArqDefault)


def _deep() -> Plan:
    made: Plan = []
    pairs: tuple[tuple[type[Row], type[Row]], ...] = ((ShallowQueue, DeepQueue), (ShallowTopic, DeepTopic))
    for shallow, deep in pairs:
        kind = "queue" if shallow is ShallowQueue else "topic"
        for handlers in (1, 100):
            if kind == "queue" or handlers > 1:
                work = Work(
                    name=f"deep-{kind}-{handlers}",
                    title=f"the first of a backlog, {handlers} handler{'s at once' if handlers > 1 else ''}",
                    backend="redis",
                    yardstick=shallow.name,
                    handlers=handlers,
                    keyed=kind == "topic",
                    keys=KEYS,
                    goals=_goals(0.8, shallow, deep),
                )
                made.append((work, (shallow, deep)))
        publishing = Work(
            name=f"deep-{kind}-publish",
            title=f"100 tasks publish to a {kind} with a backlog",
            backend="redis",
            yardstick=shallow.name,
            stores=True,
            handlers=100,
            keys=KEYS,
            goals=_goals(0.8, shallow, deep),
        )
        made.append((publishing, (shallow, deep)))
    return made
