"""What is not a rate on Kafka: a large backlog, many topics, the cost of waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Final

from ..on_servers.answers import TOPICS, Drain
from ..on_servers.probes import Server, crowd, drain, growth, idle
from ..probes import Ask, Asked, Finding, Probe, ask
from .answers import SHARED, Shared, expected
from .server import connections, pid, serve, wire
from .share import divided, lag

SLOWER: Final = 20.0
"""Percent that the rate may be lower while a million messages are drained."""
PREFETCH: Final = 2000
CONSUMERS: Final = 8
EACH: Final = 2
"""Of them in one process."""
PARTITIONS: Final = 2
UNEVEN: Final = 10.0
"""Percent that the share of one consumer may be off the mean."""
ANSWERS: Final = ".on_kafka.answers"
SERVER: Final = Server(serve=serve, pid=pid, connections=connections)


def _drain(kind: str, called: str, prefetch: int | None, smoke: bool) -> Iterator[Finding]:
    few, many = (10_000, 50_000) if smoke else (100_000, 1_000_000)
    drained = [drain(SERVER, kind, n, prefetch) for n in (few, many, few)]
    large = drained[1]
    yield growth(f"client's growth while draining {many:,}, {called}", large)
    name = f"slower while draining {many:,} than while draining {few:,}, {called}"
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


def _sharing(smoke: bool) -> Iterator[Finding]:
    """Have consumers wait, and see how a backlog comes to them that takes all of them some time."""
    n, processes = (800 if smoke else 20_000), CONSUMERS // EACH
    name = f"unevenness of {CONSUMERS} consumers of a queue of {PARTITIONS} partitions"
    with serve() as plain:
        url = divided(plain, PARTITIONS)
        asked = [Asked(Ask("consume", n=EACH, url=url, module=ANSWERS)) for _ in range(processes)]
        ready = sum(one.wait_ready() for one in asked) == processes
        time.sleep(2 if smoke else 10)  # whatever a group does when members come is done by then
        fed = ask(Ask("feed", n=n, url=url, module=ANSWERS), float) if ready else "the consumers did not start"
        answers = [one.answer(Shared) for one in asked]
        with wire(plain) as admin:
            partitions = len(admin.cluster([SHARED.name]).topics.get(SHARED.name, {}))
        left = lag(plain, SHARED.name) if partitions else n
    failed = [one for one in (fed, *answers) if isinstance(one, str)]
    if isinstance(fed, str) or failed:
        yield Finding(name=name, flaw="; ".join(dict.fromkeys(failed)))
        return
    each = [seen for one in answers if not isinstance(one, str) for seen in one.seen]
    yield judged(name, each, n, left, partitions, fed)


def judged(name: str, each: list[list[int]], n: int, left: int, partitions: int, seconds: float) -> Finding:
    """Return by how much the share of one of them is off the mean, if all *n* came once."""
    seen = [number for one in each for number in one]
    distinct = len(set(seen) & set(range(n)))
    if distinct != n or len(seen) != n or left or partitions != PARTITIONS or len(each) != CONSUMERS:
        flaw = f"{distinct:,} of {n:,} handled, {len(seen) - distinct:,} double or unknown, {left:,} unsettled"
        return Finding(name=name, flaw=f"{flaw}, {len(each)} consumers, {partitions} partitions")
    counts = sorted(len(one) for one in each)
    mean = n / len(each)
    off = max(mean - counts[0], counts[-1] - mean) / mean * 100
    detail = f"{n:,} messages, each handled by {' '.join(map(str, counts))}; {n / seconds:,.0f} msgs/s of {expected(CONSUMERS):,.0f}"
    return Finding(name=name, value=off, unit="percent", limit=UNEVEN, detail=detail)


ALL: Final = (
    Probe(
        name="drain",
        title="draining a large backlog: a client's memory and rate",
        find=partial(_drain, "topic", "topic with a group", None),
    ),
    Probe(
        name="drain-queue",
        title="draining a large queue: a client's memory and rate",
        find=partial(_drain, "queue", "queue", PREFETCH),
    ),
    Probe(
        name="idling",
        title="the cost of waiting",
        find=partial(idle, SERVER, "an idle consumer of a topic, 100 handlers", "topic"),
    ),
    Probe(
        name="idling-queue",
        title="the cost of waiting for a queue",
        find=partial(idle, SERVER, "an idle consumer of a queue, 100 handlers", "queue"),
    ),
    Probe(name="sharing", title="more consumers than partitions", find=_sharing),
    Probe(
        name="topics",
        title=f"{TOPICS} topics in a process",
        find=lambda smoke: crowd(SERVER, f"{TOPICS} topics in a process, 10 handlers each", "topics", 1, TOPICS, smoke),
    ),
)
