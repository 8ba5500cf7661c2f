"""One measurement, seen from the process that runs it: what to do, what was handled, how long it took."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

WINDOW: Final = 1000
"""Most messages that a publisher is ahead of the handlers in one process, in every row alike."""
KEYS: Final = 1000
RATE: Final = 200
"""Messages a second where latency is measured."""


@dataclass
class Order:
    """The payload of all rows: 100 bytes of JSON, give or take the digits."""

    n: int
    t: int
    kind: str
    user: str
    amount: float
    pad: str


def order(n: int) -> Order:
    """Return message number *n*; its user is its key."""
    return Order(n, 0, "order.created", f"u-{n % KEYS:06d}", 12.5, "x" * 20)


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
    wall: float = 0.0
    cpu: float = 0.0
    p50: float | None = None
    p99: float | None = None
    error: str | None = None

    def flaw(self) -> str | None:
        """Return why these figures must not be shown, or None."""
        if self.error is not None:
            return self.error
        wrong = {
            "lost": self.n - self.handled,
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
        self, n: int, *, url: str = "", entity: str = "bench", ready: Callable[[], None] = lambda: None
    ) -> None:
        self.n = n
        self.url = url
        self.entity = entity
        """A name that no other measurement has used."""
        self.ready = ready
        """Tells the parent that whatever runs beside this process may begin."""
        self.unsettled: int | None = None
        self.seen: list[int] = []
        self._delays: list[int] = []
        self._mark = n
        self._reached = asyncio.Event()
        self._wall = self._cpu = 0.0
        self._began = (0.0, 0.0)
        self._running = False

    def values(self) -> list[Order]:
        """Return all messages, made before the clocks start."""
        return [order(n) for n in range(self.n)]

    def counter(self) -> Callable[[Order], None]:
        """Return `got`, which each handler calls with its value: the same work in every row."""
        append, seen = self.seen.append, self.seen

        def got(value: Order) -> None:
            append(value.n)
            if len(seen) == self._mark:
                self._reached.set()

        return got

    def timer(self) -> Callable[[Order], None]:
        """Return `got` for latency: it takes the time since ``value.t``, which the publisher sets just before publishing."""
        got, delays = self.counter(), self._delays.append

        def timed(value: Order) -> None:
            delays(time.monotonic_ns() - value.t)
            got(value)

        return timed

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
        await self._until(self.n)
        self.stop()

    def stop(self) -> None:
        """Stop the clocks now; for rows that only publish."""
        self._wall = time.perf_counter() - self._began[0]
        self._cpu = time.process_time() - self._began[1]
        self._running = False
        gc.unfreeze()

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
        known = sum(1 for n in counts if 0 <= n < self.n)
        figures = Figures(
            n=self.n,
            handled=known,
            doubles=len(self.seen) - len(counts),
            strays=len(counts) - known,
            unsettled=self.unsettled,
            wall=self._wall,
            cpu=self._cpu,
            error=error,
        )
        if keyed:
            newest: dict[int, int] = {}
            for n in self.seen:
                figures.disorder += n < newest.get(n % KEYS, -1)
                newest[n % KEYS] = n
        if self._delays:
            warm = sorted(self._delays[len(self._delays) // 10 :])
            figures.p50 = warm[len(warm) // 2] / 1e6
            figures.p99 = warm[min(len(warm) - 1, len(warm) * 99 // 100)] / 1e6
        return figures
