"""One measurement, seen from the process that runs it: what to do, what was handled, how long it took."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

WINDOW: Final = 1000
"""Most messages that a publisher is ahead of the handlers in one process, in every row alike."""
KEYS: Final = 1000
RATE: Final = 200
"""Messages a second where latency is measured."""
LATE: Final = 0.25
"""Seconds that late acknowledgements and second deliveries are given, once a stored backlog was handled."""


@dataclass
class Order:
    """The payload of all rows: 100 bytes of JSON, give or take the digits."""

    n: int
    t: int
    kind: str
    user: str
    amount: float
    pad: str


def order(n: int, keys: int = KEYS) -> Order:
    """Return message number *n*; its user is its key."""
    return Order(n, 0, "order.created", f"u-{n % keys:06d}", 12.5, "x" * 20)


class Figures(msgspec.Struct, kw_only=True):
    """What one measurement found.  Its figures may be shown only where `flaw` is None."""

    n: int
    handled: int = 0
    doubles: int = 0
    strays: int = 0
    """Messages that nobody published."""
    disorder: int = 0
    """Messages of a key that came before an earlier one of it, where order is promised."""
    unsettled: int | None = None
    """What the system still holds afterwards; None where there is nothing to ask."""
    behind: int = 0
    """Messages stored beyond the *n* that are measured."""
    left: int = 0
    """How many of all of them still wait afterwards, each of them unhandled."""
    wall: float = 0.0
    cpu: float = 0.0
    p50: float | None = None
    p99: float | None = None
    error: str | None = None

    def flaw(self) -> str | None:
        """Return why these figures must not be shown, or None."""
        if self.error is not None:
            return self.error
        missing = self.n + self.behind - self.handled - self.left
        wrong = {
            "lost": max(0, missing, self.n - self.handled),
            "too many": max(0, -missing),
            "double": self.doubles,
            "never published": self.strays,
            "out of order": self.disorder,
            "unsettled": self.unsettled or 0,
        }
        found = [f"{count} {what}" for what, count in wrong.items() if count]
        if not found and self.wall <= 0:
            found = ["no time was taken"]
        return f"{', '.join(found)} of {self.n}" if found else None

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.n / self.wall


class Job:
    """What a row's `run` is given.

    It publishes `values`, has its handler call `got` with each one, and calls `begin` before the first publish.  Then
    `finish` waits until all were handled and stops the clocks; whatever comes later is still counted.
    """

    def __init__(
        self,
        n: int,
        *,
        url: str = "",
        entity: str = "bench",
        ready: Callable[[], None] = lambda: None,
        keys: int = KEYS,
        behind: int = 0,
    ) -> None:
        self.n = n
        self.keys = keys
        self.behind = behind
        """Messages stored beyond the *n* that are measured: those stay behind them."""
        self.url = url
        self.entity = entity
        """A name that no other measurement has used."""
        self.ready = ready
        """Tells the parent that whatever runs beside this process may begin."""
        self.unsettled: int | None = None
        self.left = 0
        self.seen: list[int] = []
        """The numbers handled, in their order; in `Row.audit` the numbers found stored."""
        self._delays: list[int] = []
        self._mark = n
        self._reached = asyncio.Event()
        self._wall = self._cpu = 0.0
        self._began = (0.0, 0.0)
        self._running = self._drains = False

    def values(self) -> list[Order]:
        """Return all messages that are measured, made before the clocks start."""
        return [order(n, self.keys) for n in range(self.n)]

    def stock(self) -> list[Order]:
        """Return all messages, those that stay behind too."""
        return [order(n, self.keys) for n in range(self.n + self.behind)]

    def counter(self) -> Callable[[Order], None]:
        """Return `got`, which each handler calls with its value: the same work in every row."""
        append, seen = self.seen.append, self.seen

        def got(value: Order) -> None:
            append(value.n)
            if len(seen) == self._mark:
                self._pass()

        return got

    def numbers(self) -> Callable[[int], None]:
        """Return the same for handlers that see a number instead of an `Order`."""
        append, seen = self.seen.append, self.seen

        def got(number: int) -> None:
            append(number)
            if len(seen) == self._mark:
                self._pass()

        return got

    def timer(self) -> Callable[[Order], None]:
        """Return `got` for latency: it takes the time since ``value.t``, which the publisher sets just before publishing."""
        got, delays = self.counter(), self._delays.append

        def timed(value: Order) -> None:
            delays(time.monotonic_ns() - value.t)
            got(value)

        return timed

    def dicts(self, *, timed: bool) -> Callable[[dict[str, Any]], None]:
        """Return `got` for handlers that see a dict; *timed*: it takes the time since its "t"."""
        got, delays = self.numbers(), self._delays.append

        def timing(value: dict[str, Any]) -> None:
            delays(time.monotonic_ns() - value["t"])
            got(value["n"])

        return timing if timed else lambda value: got(value["n"])

    def drain(self) -> None:
        """Have the clocks run from the first message handled to the last one, and not from `begin`.

        So a stored backlog is measured: connecting and the first answer of the server are no part of it.
        """
        self._drains = True
        self._mark = 1

    def begin(self) -> None:
        """Start the clocks."""
        gc.collect()
        gc.freeze()
        self._running = True
        self._began = (time.perf_counter(), time.process_time())

    async def room(self, published: int) -> None:
        """Wait while *published* is more than `WINDOW` ahead of the handlers."""
        if published - len(self.seen) > WINDOW:
            await self._until(published - WINDOW // 2)

    async def finish(self) -> None:
        """Wait for the last message and stop the clocks."""
        if self._drains:
            await self._reached.wait()
            await asyncio.sleep(LATE)
        else:
            await self._until(self.n)
            self.stop()

    def stop(self) -> None:
        """Stop the clocks now; for rows that only publish."""
        self._wall = time.perf_counter() - self._began[0]
        self._cpu = time.process_time() - self._began[1]
        self._running = False
        gc.unfreeze()

    def took(self, wall: float, cpu: float) -> None:
        """Set the seconds that other processes have taken, where those are what is measured."""
        self._wall, self._cpu = wall, cpu

    def delays(self, nanoseconds: Iterable[int]) -> None:
        """Take latencies that others have measured."""
        self._delays += nanoseconds

    def _pass(self) -> None:
        if not self._drains:
            self._reached.set()
        elif len(self.seen) < self.n:
            self._mark = self.n
            self.begin()
        else:
            self.stop()
            self._reached.set()

    async def _until(self, mark: int) -> None:
        self._reached.clear()
        self._mark = mark
        if len(self.seen) < mark:
            await self._reached.wait()

    def figures(self, *, keyed: bool = False, error: str | None = None) -> Figures:
        """Return what was found; with *keyed* each key must have been handled in order."""
        if self._running:
            self.stop()
        counts = Counter(self.seen)
        known = sum(1 for n in counts if 0 <= n < self.n + self.behind)
        figures = Figures(
            n=self.n,
            handled=known,
            doubles=len(self.seen) - len(counts),
            strays=len(counts) - known,
            unsettled=self.unsettled,
            behind=self.behind,
            left=self.left,
            wall=self._wall,
            cpu=self._cpu,
            error=error,
        )
        if keyed:
            newest: dict[int, int] = {}
            for n in self.seen:
                figures.disorder += n < newest.get(n % self.keys, -1)
                newest[n % self.keys] = n
        if self._delays:
            warm = sorted(self._delays[len(self._delays) // 10 :])
            figures.p50 = warm[len(warm) // 2] / 1e6
            figures.p99 = warm[min(len(warm) - 1, len(warm) * 99 // 100)] / 1e6
        return figures
