"""What is not a rate on Redis: memory here and there, many consumers, the cost of waiting."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from statistics import quantiles
from typing import Final

import orjson

from ..job import order
from ..probes import Ask, Asked, Finding, Probe, ask
from .answers import KEYS, PACED, QUEUES, Crowd, Drain
from .server import client, info, serve

GROWTH: Final = 50.0
"""MiB that a client may grow while it drains a million messages."""
OVERHEAD: Final = 64.0
"""Bytes that Redis may take for a message beyond its payload."""
IDLE: Final = 1.0
"""Percent of a core that an idle consumer may take."""
ANSWERS: Final = ".on_redis.answers"
KINDS: Final = {"queue": "queue", "topic": "topic with a group"}


def _drain(smoke: bool) -> Iterator[Finding]:
    n = 50_000 if smoke else 1_000_000
    for kind, called in KINDS.items():
        name = f"client's growth while draining {n:,}, {called}"
        with serve() as url:
            filled = ask(Ask("fill", kind, n, url=url, module=ANSWERS), float)
            found = ask(Ask("drain", kind, n, url=url, module=ANSWERS), Drain) if isinstance(filled, float) else filled
        if isinstance(found, str):
            yield Finding(name=name, flaw=found)
        elif found.handled != n or found.doubles or found.unsettled:
            flaw = f"{found.handled:,} of {n:,} handled, {found.doubles:,} of them twice, {found.unsettled:,} unsettled"
            yield Finding(name=name, flaw=flaw)
        else:
            some = found.samples[:: max(1, len(found.samples) // 10)]
            detail = (
                f"resident MiB on the way: {' '.join(f'{one:.0f}' for one in some)}; {n / found.seconds:,.0f} msgs/s; "
                f"filled at {n / float(filled):,.0f} msgs/s"
            )
            yield Finding(name=name, value=found.grown, unit="MiB", limit=GROWTH, detail=detail)


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


def _idle(smoke: bool) -> Iterator[Finding]:
    name = "idle consumers of a queue and of a topic, 100 handlers each"
    with serve() as url:
        clock = _Cpu([int(info(url)["process_id"])])
        found = ask(Ask("idle", seconds=1.0 if smoke else 10.0, url=url, module=ANSWERS), float)
        server = clock.percent()
    if isinstance(found, str):
        yield Finding(name=name, flaw=found)
    else:
        detail = f"of the server {server:.2f} % core, with what starting them takes"
        yield Finding(name=name, value=found * 100, unit="% core", limit=IDLE, detail=detail)


class _Cpu:
    """CPU that processes take from now on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._began = (time.monotonic(), self._ticks())

    def _ticks(self) -> int:
        total = 0
        for pid in self._pids:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
                # What is before the last bracket is a name, which may hold blanks.
                fields = stat.read().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total

    def percent(self) -> float:
        """Return percent of a core."""
        wall = time.monotonic() - self._began[0]
        return (self._ticks() - self._began[1]) / os.sysconf("SC_CLK_TCK") / wall * 100


def _crowd(name: str, kind: str, processes: int, each: int, smoke: bool) -> Iterator[Finding]:
    n = 2_000 if smoke else 50_000
    total = n + PACED
    with serve() as url:
        crowd = [Asked(Ask("crowd", kind, each, url=url, module=ANSWERS)) for _ in range(processes)]
        ready = sum(one.wait_ready() for one in crowd) == processes
        # Members of a group need a few rounds to share it out.
        time.sleep(2 if smoke else 20)
        server, clients = _Cpu([int(info(url)["process_id"])]), _Cpu([one.process.pid for one in crowd])
        time.sleep(1 if smoke else 5)
        idle = (server.percent(), clients.percent() / (processes * each))
        connections = info(url)["connected_clients"] - 1
        fed = ask(Ask("feed", kind, n, url=url, module=ANSWERS), float) if ready else "the consumers did not start"
        answers = [one.answer(Crowd) for one in crowd]
    found = [one for one in answers if not isinstance(one, str)]
    failed = [one for one in (fed, *answers) if isinstance(one, str)]
    if isinstance(fed, str) or failed:
        yield Finding(name=name, flaw="; ".join(dict.fromkeys(failed)))
        return
    seen = [number for one in found for number in one.seen]
    distinct = len(set(seen) & set(range(total)))
    if distinct != total or len(seen) != total:
        yield Finding(name=name, flaw=f"{distinct:,} of {total:,} handled, {len(seen) - distinct:,} double or unknown")
        return
    delays = sorted(delay / 1e6 for one in found for delay in one.delays)
    cuts = quantiles(delays, n=100) if len(delays) > 1 else [0.0] * 99
    detail = (
        f"{sum(one.busy for one in found)} of them had work; publish to handler at 200 messages a second p50 {cuts[49]:.2f} ms, "
        f"p99 {cuts[98]:.2f} ms; idle: server {idle[0]:.2f} % core, each consumer {idle[1]:.3f} % core; {connections} connections"
    )
    yield Finding(name=name, value=n / fed, unit="msgs/s", detail=detail)


ALL: Final = (
    Probe(name="drain", title="a client's memory while draining a backlog", find=_drain),
    Probe(name="storage", title="bytes in Redis", find=_storage),
    Probe(name="idling", title="the cost of waiting", find=_idle),
    Probe(
        name="queues",
        title=f"{QUEUES} queues in a process",
        find=lambda smoke: _crowd(f"{QUEUES} queues in a process, 10 handlers each", "queues", 1, QUEUES, smoke),
    ),
    Probe(
        name="consumers",
        title="100 consumers of a queue",
        find=lambda smoke: _crowd("100 consumers of a queue, 4 processes of 25 brokers", "queue", 4, 25, smoke),
    ),
    Probe(
        name="members",
        title="100 members of a group",
        find=lambda smoke: _crowd("100 members of a group, 128 partitions, 4 processes", "wide", 4, 25, smoke),
    ),
)
