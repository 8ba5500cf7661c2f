"""What is not a rate: a worker that starts, that has nothing to do, and that is stopped."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Final

import msgspec

from ..frame import Work
from ..job import Job
from ..probes import Ask, Finding, Probe, ask
from . import rows, server
from .rows import OurKafka, OurRedis, Program, StockKafka, StockRedis
from .worker import working

ROUNDS: Final = 3
SETTLE: Final = 3.0
"""Seconds after which a worker that has executed its first task does nothing more."""
OPTIONS: Final = ("-P", "prefork", "-c", "2")
PROGRAMS: Final[tuple[type[Program], ...]] = (StockRedis, StockKafka, OurRedis, OurKafka)
MODULE: Final = ".on_celery.probes"


class Life(msgspec.Struct):
    """What was seen of a worker."""

    first: float
    """Seconds from its start until it has executed a task that was stored before."""
    cpu: float
    """Percent of a core that it takes with nothing to do."""
    memory: float
    """MiB of all its processes, what they share counted once."""
    stop: float
    """Seconds that a warm shutdown takes."""


LIMITS: Final[Mapping[str, tuple[str, str, Mapping[type[Program], float]]]] = {
    "first": ("from a worker's start to its first task", "s", {OurRedis: 1.0, OurKafka: 1.5}),
    "cpu": ("CPU of a worker with nothing to do", "% core", {OurRedis: 1.5, OurKafka: 1.5}),
    "memory": ("memory of a worker with nothing to do", "MiB", {OurRedis: 1.2, OurKafka: 1.2}),
    "stop": ("warm shutdown of a worker with nothing to do", "s", {OurRedis: 1.0, OurKafka: 1.0}),
}
"""What each is called, its unit, and at most how many times that of stock Celery on Redis it may be."""
_counter = itertools.count(1)


def answer(question: Ask) -> bytes:
    """Publish one task, and start a worker that executes it, idles and is stopped; return its `Life`."""

    async def main() -> Life:
        entity, _, urls = question.url.partition(" ")
        job = Job(1, url=urls, entity=entity)
        kind: type[Program] = getattr(rows, question.kind)
        program = kind(Work(name="life", title="", backend="celery"), job)
        await program.fill()
        async with working(program.broker(), entity, OPTIONS) as worker:
            await worker.until(lambda: bool(worker.executions()))
            await asyncio.sleep(SETTLE)
            before = worker.cpu()
            await asyncio.sleep(question.seconds)
            cpu, memory = worker.cpu() - before, worker.memory()
            stop = await worker.stop()
            done = worker.executions()
        if [one.number for one in done] != [0]:
            raise RuntimeError(f"one task was published, executed were {[one.number for one in done]}")
        return Life((done[0].at - worker.started) / 1e9, cpu / question.seconds * 100, memory, stop)

    return msgspec.json.encode(asyncio.run(main()))


def _lives(smoke: bool) -> Iterator[Finding]:
    lives: dict[type[Program], list[Life]] = {program: [] for program in PROGRAMS}
    with server.serve() as urls:
        for number in range(1 if smoke else ROUNDS):
            for program in PROGRAMS if number % 2 == 0 else reversed(PROGRAMS):
                entity = f"{server.NAME}{os.getpid()}-life-{next(_counter)}"
                seconds = 1.0 if smoke else 20.0
                found = ask(Ask("life", program.__name__, seconds=seconds, url=f"{entity} {urls}", module=MODULE), Life)
                if isinstance(found, str):
                    yield Finding(name=f"a worker's life, {program.name}", flaw=found)
                    return
                lives[program].append(found)
    yield from judged(lives)


def judged(lives: Mapping[type[Program], Sequence[Life]]) -> Iterator[Finding]:
    """Yield how many times that of stock Celery on Redis everything is, compared within each round."""
    for field, (title, unit, limits) in LIMITS.items():
        values = {program: [getattr(life, field) for life in found] for program, found in lives.items()}
        shown = ", ".join(f"{program.name} {median(found):.3g}" for program, found in values.items())
        for program in PROGRAMS[1:]:
            pairs = zip(values[program], values[StockRedis], strict=True)
            yield Finding(
                name=f"{title}, {program.name}",
                value=median(one / max(other, 1e-9) for one, other in pairs),
                unit="x stock",
                limit=limits.get(program),
                detail=f"{shown} {unit}" if program is PROGRAMS[-1] else "",
            )


ALL: Final = (Probe(name="life", title="a worker that starts, waits and stops", find=_lives),)
