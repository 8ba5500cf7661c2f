"""What is not a rate on Kafka: a large backlog, many topics, the cost of waiting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Final

from ..on_servers.answers import TOPICS, Drain
from ..on_servers.probes import Server, crowd, drain, growth, idle
from ..probes import Finding, Probe
from .server import connections, pid, serve

SLOWER: Final = 20.0
"""Percent that the rate may be lower while a million messages are drained."""
SERVER: Final = Server(serve=serve, pid=pid, connections=connections)


def _drain(smoke: bool) -> Iterator[Finding]:
    few, many = (10_000, 50_000) if smoke else (100_000, 1_000_000)
    drained = [drain(SERVER, "topic", n) for n in (few, many, few)]
    large = drained[1]
    yield growth(f"client's growth while draining {many:,}, topic with a group", large)
    name = f"slower while draining {many:,} than while draining {few:,}"
    flaw = next((one for one in drained if isinstance(one, str)), None)
    if flaw is not None or isinstance(large, str):
        yield Finding(name=name, flaw=flaw)
        return
    short = median(one[0].rate for one in drained[::2] if not isinstance(one, str))
    detail = f"{short:,.0f} msgs/s, and {large[0].rate:,.0f}; each tenth of those {tenths(large[0])}"
    yield Finding(name=name, value=(1 - large[0].rate / short) * 100, unit="percent", limit=SLOWER, detail=detail)


def tenths(found: Drain) -> str:
    """Return the rate of each tenth but the first, which has the start in it."""
    step = len(found.times) // 10
    marks = found.times[step - 1 :: step]
    size = found.handled // 10
    return " ".join(f"{size / (end - start):,.0f}" for start, end in pairwise(marks))


ALL: Final = (
    Probe(name="drain", title="draining a large backlog: a client's memory and rate", find=_drain),
    Probe(
        name="idling",
        title="the cost of waiting",
        find=partial(idle, SERVER, "an idle consumer of a topic, 100 handlers", "topic"),
    ),
    Probe(
        name="topics",
        title=f"{TOPICS} topics in a process",
        find=lambda smoke: crowd(SERVER, f"{TOPICS} topics in a process, 10 handlers each", "topics", 1, TOPICS, smoke),
    ),
)
