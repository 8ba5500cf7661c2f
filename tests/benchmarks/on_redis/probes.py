"""What is not a rate on Redis: memory here and there, many consumers, the cost of waiting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import orjson

from ..job import order
from ..on_servers.answers import KEYS, QUEUES
from ..on_servers.probes import ANSWERS, Server, crowd, drain, growth, idle
from ..probes import Ask, Finding, Probe, ask
from .server import client, info, serve

OVERHEAD: Final = 64.0
"""Bytes that Redis may take for a message beyond its payload."""
KINDS: Final = {"queue": "queue", "topic": "topic with a group"}
SERVER: Final = Server(
    serve=serve,
    pid=lambda url: int(info(url)["process_id"]),
    connections=lambda url: int(info(url)["connected_clients"]) - 1,
)


def _drain(smoke: bool) -> Iterator[Finding]:
    n = 50_000 if smoke else 1_000_000
    for kind, called in KINDS.items():
        yield growth(f"client's growth while draining {n:,}, {called}", drain(SERVER, kind, n))


def _storage(smoke: bool) -> Iterator[Finding]:
    n, first = (5_000 if smoke else 200_000), 1_000
    payload = sum(len(orjson.dumps(order(number, KEYS))) for number in range(n)) / n
    for kind, called in KINDS.items():
        name = f"bytes in Redis for a message beyond its payload, {called}"
        with serve() as url:
            # The first ones make what is there once, however many messages come.
            begun = ask(Ask("fill", kind, first, url=url, module=ANSWERS), float)
            before, stored = info(url)["used_memory"], _stored(url)
            filled = ask(Ask("fill", kind, n, url=url, module=ANSWERS), float) if isinstance(begun, float) else begun
            used, keys = info(url)["used_memory"] - before, _stored(url) - stored
        if isinstance(filled, str):
            yield Finding(name=name, flaw=filled)
            continue
        detail = f"{n:,} payloads of {payload:.1f} B; by the MEMORY USAGE of all keys {keys / n - payload:.1f}"
        yield Finding(name=name, value=used / n - payload, unit="bytes", limit=OVERHEAD, detail=detail)


def _stored(url: str) -> int:
    with client(url) as asking:
        return sum(asking.memory_usage(key, samples=0) or 0 for key in asking.scan_iter(count=1000))


ALL: Final = (
    Probe(name="drain", title="a client's memory while draining a backlog", find=_drain),
    Probe(name="storage", title="bytes in Redis", find=_storage),
    Probe(
        name="idling",
        title="the cost of waiting",
        find=partial(idle, SERVER, "idle consumers of a queue and of a topic, 100 handlers each", "queue topic"),
    ),
    Probe(
        name="queues",
        title=f"{QUEUES} queues in a process",
        find=lambda smoke: crowd(SERVER, f"{QUEUES} queues in a process, 10 handlers each", "queues", 1, QUEUES, smoke),
    ),
    Probe(
        name="consumers",
        title="100 consumers of a queue",
        find=lambda smoke: crowd(SERVER, "100 consumers of a queue, 4 processes of 25 brokers", "queue", 4, 25, smoke),
    ),
    Probe(
        name="members",
        title="100 members of a group",
        find=lambda smoke: crowd(SERVER, "100 members of a group, 128 partitions, 4 processes", "wide", 4, 25, smoke),
    ),
)
