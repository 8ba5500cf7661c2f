"""What is not a rate, found out alike on all servers through brokerkit's public interface."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import quantiles
from typing import Final

from ..probes import Ask, Asked, Finding, ask
from .answers import PACED, Crowd, Drain

GROWTH: Final = 50.0
"""MiB that a client may grow while it drains a million messages."""
IDLE: Final = 1.0
"""Percent of a core that an idle consumer may take."""
ANSWERS: Final = ".on_servers.answers"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server for a probe alone."""

    serve: Callable[[], AbstractContextManager[str]]
    """Starts it and yields its URL."""
    pid: Callable[[str], int]
    connections: Callable[[str], int]
    """How many clients are connected."""


def drain(server: Server, kind: str, n: int, prefetch: int | None = None) -> tuple[Drain, float] | str:
    """Fill an address and drain it; return how that went and how long filling took, or what went wrong."""
    with server.serve() as url:
        filled = ask(Ask("fill", kind, n, url=url, module=ANSWERS), float)
        question = Ask("drain", kind, n, url=url, prefetch=prefetch, module=ANSWERS)
        found = ask(question, Drain) if isinstance(filled, float) else filled
    if isinstance(found, str) or isinstance(filled, str):
        return str(found)
    if found.handled != n or found.doubles or found.unsettled:
        return f"{found.handled:,} of {n:,} handled, {found.doubles:,} of them twice, {found.unsettled:,} unsettled"
    return found, filled


def growth(name: str, drained: tuple[Drain, float] | str) -> Finding:
    """Return how much a client grew while it drained."""
    if isinstance(drained, str):
        return Finding(name=name, flaw=drained)
    found, filled = drained
    some = found.samples[:: max(1, len(found.samples) // 10)]
    detail = (
        f"resident MiB on the way: {' '.join(f'{one:.0f}' for one in some)}; {found.handled / found.seconds:,.0f} msgs/s; "
        f"filled at {found.handled / filled:,.0f} msgs/s"
    )
    return Finding(name=name, value=found.grown, unit="MiB", limit=GROWTH, detail=detail)


def idle(server: Server, name: str, kinds: str, smoke: bool) -> Iterator[Finding]:
    """Find out what consumers of *kinds* take that have nothing to do."""
    with server.serve() as url:
        clock = Cpu([server.pid(url)])
        found = ask(Ask("idle", kinds, seconds=1.0 if smoke else 10.0, url=url, module=ANSWERS), float)
        there = clock.percent()
    if isinstance(found, str):
        yield Finding(name=name, flaw=found)
    else:
        detail = f"of the server {there:.2f} % core, with what starting them takes"
        yield Finding(name=name, value=found * 100, unit="% core", limit=IDLE, detail=detail)


class Cpu:
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


def crowd(server: Server, name: str, kind: str, processes: int, each: int, smoke: bool) -> Iterator[Finding]:
    """Have consumers wait, and time what comes to them, first slowly and then at once."""
    n = 2_000 if smoke else 50_000
    total = n + PACED
    with server.serve() as url:
        asked = [Asked(Ask("crowd", kind, each, url=url, module=ANSWERS)) for _ in range(processes)]
        ready = sum(one.wait_ready() for one in asked) == processes
        # Members of a group need a few rounds to share it out.
        time.sleep(2 if smoke else 20)
        there, clients = Cpu([server.pid(url)]), Cpu([one.process.pid for one in asked])
        time.sleep(1 if smoke else 5)
        idle = (there.percent(), clients.percent() / (processes * each))
        connections = server.connections(url)
        fed = ask(Ask("feed", kind, n, url=url, module=ANSWERS), float) if ready else "the consumers did not start"
        answers = [one.answer(Crowd) for one in asked]
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
