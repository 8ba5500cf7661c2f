"""The frame: rows, each measured in processes of its own, in alternating rounds.

A driver adds rows: a subclass of `Row` for each program, instances of `Work` for what they do, and a `Backend` that starts
its server.  Nothing here knows a message system.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import IO, ClassVar, Final, Literal, get_args

import msgspec
import uvloop

from .fresh import output, start
from .job import KEYS, RATE, Figures, Job

READY: Final = "READY"
RESULT: Final = "RESULT "
Part = Literal["fill", "run", "feed", "audit"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)
Metric = Literal["rate", "latency"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """*row* against *than*: at least so many times its rate, or at most so many times its latency."""

    row: str
    than: str
    factor: float
    quantile: Literal["p50", "p99"] = "p50"
    """Which latency."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured; a heading of the table."""

    name: str
    title: str
    backend: str
    metric: Metric = "rate"
    handlers: int = 1
    keyed: bool = False
    """Whether rows that promise order per key are held to it."""
    batch: int = 1
    """Messages given to one publish call."""
    yields: bool = False
    """Whether handlers give the loop back once, so that they really overlap."""
    keys: int = KEYS
    partitions: int = 1
    """Of the log, where each program can choose."""
    stores: bool = False
    """Whether it ends when all is stored: what `Row.audit` finds in the system is then what counts."""
    yardstick: str = "bare"
    """The row that all are shown against."""
    goals: tuple[Goal, ...] = ()
    most: int = 60_000
    """Largest number of messages in one measurement."""
    exactly: int | None = None
    """The number of messages, where it is not to be calibrated."""
    longer: float = 1.0
    """How many times the usual length, for a latency whose tail is to be seen."""


class Row:
    """One program doing one work.  Each of its parts runs in a fresh process, on uvloop."""

    name: ClassVar[str]
    note: ClassVar[str] = ""
    peer: ClassVar[bool] = False
    """Whether it is another library that promises what is measured."""
    ordered: ClassVar[bool] = False
    """Whether it promises order per key."""
    least: ClassVar[int] = 500
    """Smallest number of messages in one measurement; less for what is very slow."""
    behind: ClassVar[int] = 0
    """Messages stored beyond those that are measured."""
    exactly: ClassVar[int | None] = None
    """The number of messages, where it is not to be calibrated."""

    def __init__(self, work: Work, job: Job) -> None:
        self.work = work
        self.job = job

    async def fill(self) -> None:
        """Store all messages before the measurement, where it starts from a backlog."""

    async def run(self) -> None:
        """Do the work; its process is what is measured."""
        raise NotImplementedError

    async def feed(self) -> None:
        """Publish beside `run`, from the moment it calls ``job.ready()``."""

    async def audit(self) -> None:
        """Look at what the system holds at the end, independently of what `run` saw.

        Sets ``job.unsettled`` and ``job.left``, and where the work only stores puts each number found into ``job.seen``.
        """

    @classmethod
    def parts(cls, work: Work) -> frozenset[Part]:
        """Return what is to be run for *work*: what is overridden."""
        return frozenset(part for part in PARTS if getattr(cls, part) is not getattr(Row, part))

    @staticmethod
    def interpreter() -> str:
        """Return the Python that runs it; raises `OSError` if there is none."""
        return sys.executable


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A message system to measure on."""

    name: str
    serve: Callable[[], AbstractContextManager[str]]
    """Starts it and yields its URL."""
    clean: Callable[[str], None] = lambda url: None
    """Called before each measurement."""


Plan = Sequence[tuple[Work, Sequence[type[Row]]]]


class Assignment(msgspec.Struct):
    """What a fresh process is told."""

    module: str
    row: str
    work: Work
    part: Part
    n: int
    url: str
    entity: str
    limit: float
    behind: int = 0


# In the fresh process ------------------------------------------------------------------------------------------------


def run_part(assignment: Assignment, out: IO[str]) -> None:
    """Do what *assignment* says and write one result line to *out*."""
    kind: type[Row] = getattr(importlib.import_module(assignment.module), assignment.row)

    def ready() -> None:
        print(READY, file=out, flush=True)

    async def main() -> Figures:
        job = Job(
            assignment.n,
            url=assignment.url,
            entity=assignment.entity,
            ready=ready,
            keys=assignment.work.keys,
            behind=assignment.behind,
        )
        error = None
        try:
            async with asyncio.timeout(assignment.limit):
                await getattr(kind(assignment.work, job), assignment.part)()
        except TimeoutError:
            error = f"not done after {assignment.limit:g} s, {len(job.seen)} of {job.n} handled"
        except Exception as failure:  # whatever it is, it is this row's result
            error = f"{type(failure).__name__}: {failure}"[:300]
        return job.figures(keyed=assignment.work.keyed and kind.ordered, error=error)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(main())
    print(RESULT + msgspec.json.encode(figures).decode(), file=out, flush=True)


# In the parent -------------------------------------------------------------------------------------------------------


class _Part:
    """A fresh process that runs one part of a row."""

    def __init__(self, assignment: Assignment, python: str) -> None:
        self._n = assignment.n
        self._process = start("--part", msgspec.json.encode(assignment).decode(), python=python)
        # A row that blocks its loop cannot end itself.
        self._guard = threading.Timer(assignment.limit + 20, self._process.kill)
        self._guard.daemon = True
        self._guard.start()
        self.figures: Figures | None = None

    def wait_ready(self) -> None:
        """Return when it is ready, or has ended."""
        self._read(READY)

    def result(self) -> Figures:
        """Wait for its end."""
        self._read(None)
        self._guard.cancel()
        code = self._process.wait()
        output(self._process).close()
        return self.figures or Figures(n=self._n, error=f"the process ended without a result (exit code {code})")

    def _read(self, word: str | None) -> None:
        for line in output(self._process):
            if line.startswith(RESULT):
                self.figures = msgspec.json.decode(line[len(RESULT) :], type=Figures)
            elif line.rstrip() == word:
                return


_counter = itertools.count(1)


def measure(row: type[Row], work: Work, n: int, url: str, *, limit: float = 60.0, behind: int | None = None) -> Figures:
    """Measure *row* once with *n* messages."""
    entity = f"bench-{os.getpid()}-{next(_counter)}"
    behind = row.behind if behind is None else behind
    try:
        python = row.interpreter()
    except OSError as missing:
        return Figures(n=n, error=str(missing))

    def part(name: Part) -> _Part:
        told = Assignment(row.__module__, row.__qualname__, work, name, n, url, entity, limit, behind)
        return _Part(told, python)

    parts = row.parts(work)
    if "fill" in parts:
        filled = part("fill").result()
        if filled.error is not None:
            return Figures(n=n, error=f"fill: {filled.error}")
    running = part("run")
    fed: Figures | None = None
    if "feed" in parts:
        running.wait_ready()
        fed = part("feed").result()
    figures = running.result()
    if fed is not None and fed.error is not None:
        figures.error = f"feed: {fed.error}"
    if "audit" in parts and figures.error is None:
        believe(figures, part("audit").result(), work)
    return figures


def believe(figures: Figures, found: Figures, work: Work) -> None:
    """Put what an audit found in place of what the row says of itself."""
    if found.error is not None:
        figures.error = f"audit: {found.error}"
    if found.unsettled is not None:
        figures.unsettled = found.unsettled
    figures.left = found.left
    if work.stores:
        figures.handled, figures.doubles, figures.strays = found.handled, found.doubles, found.strays


class Results:
    """All figures of one run, by work and row, one entry a round."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rounds: dict[tuple[str, str], list[Figures]] = {
            (work.name, row.name): [] for work, rows in plan for row in rows
        }

    def good(self, work: Work, row: str) -> list[Figures]:
        """Return the figures of *row*, or none if one of its rounds has a flaw."""
        figures = self.rounds[work.name, row]
        return [] if any(one.flaw() for one in figures) else list(figures)

    def flaw(self, work: Work, row: str) -> str | None:
        """Return what is wrong with *row*."""
        return next((flaw for one in self.rounds[work.name, row] if (flaw := one.flaw())), None)

    def ratio(self, work: Work, row: str, than: str, quantile: Literal["p50", "p99"] = "p50") -> float | None:
        """Return the median over the rounds of *row* against *than*, compared within each round."""
        if (work.name, row) not in self.rounds or (work.name, than) not in self.rounds:
            return None
        pairs = list(zip(self.good(work, row), self.good(work, than), strict=False))
        if not pairs:
            return None
        if work.metric == "latency":
            return median((getattr(one, quantile) or 0.0) / (getattr(other, quantile) or 1e-9) for one, other in pairs)
        return median(one.rate / other.rate for one, other in pairs)


def run_plan(
    plan: Plan,
    backends: Sequence[Backend],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    fixed: int | None = None,
) -> Results:
    """Measure every row of *plan* *rounds* times.

    The rows of one work run one after the other, every second round in reverse, so that a drift of the machine meets them
    all.  The number of messages of a row is calibrated once so that it takes about *seconds*, or is *fixed*.
    """
    results = Results(plan)
    with contextlib.ExitStack() as stack:
        known = {backend.name: backend for backend in backends}
        urls = {name: stack.enter_context(known[name].serve()) for name in sorted({work.backend for work, _ in plan})}

        def once(row: type[Row], work: Work, n: int) -> Figures:
            known[work.backend].clean(urls[work.backend])
            behind = None if fixed is None else min(row.behind, 20 * fixed)
            return measure(row, work, n, urls[work.backend], behind=behind)

        if fixed is None:
            say(f"finding out how many messages each of {sum(len(rows) for _, rows in plan)} rows can do")
        counts: dict[tuple[str, str], int] = {}
        for work, row in _pairs(plan):
            if fixed:
                n = min(fixed, row.least, RATE // 2 if work.metric == "latency" else fixed)
            else:
                n = row.exactly or work.exactly or _calibrate(partial(once, row, work), row, work, seconds)
            counts[work.name, row.name] = n
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for work, rows in plan:
                for row in rows if number % 2 == 0 else reversed(rows):
                    if results.flaw(work, row.name):
                        continue  # it shows no figure, whatever comes
                    figures = once(row, work, counts[work.name, row.name])
                    results.rounds[work.name, row.name].append(figures)
                    if flaw := figures.flaw():
                        say(f"  {work.name}, {row.name}: {flaw}")
    return results


def _pairs(plan: Plan) -> Iterator[tuple[Work, type[Row]]]:
    return ((work, row) for work, rows in plan for row in rows)


def _calibrate(once: Callable[[int], Figures], row: type[Row], work: Work, seconds: float) -> int:
    if work.metric == "latency":
        return max(20, int(RATE * seconds * work.longer))
    n, best = 4 * row.least, 0.0
    # Twice: what a first short run spends on warming up would make the number too small.
    for share in (0.3, 1.0):
        figures = once(n)
        if figures.flaw() is None:
            best = max(best, figures.rate)
            n = min(work.most, max(row.least, int(best * seconds * share) // 100 * 100))
    return n
