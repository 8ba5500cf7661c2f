"""What is not a rate: memory over many messages, the cost of importing, the cost of doing nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final, TypeVar

import msgspec

from .fresh import environment, output, start

T = TypeVar("T")
READY: Final = "READY"
GROWTH: Final = 8.0
"""MiB that the process may grow over the last four fifths of the messages: the noise of an allocator, 10 bytes each."""
IMPORT: Final = 60.0
"""Milliseconds that `import brokerkit` may take more than importing what it stands on."""
IDLE: Final = 1.0
"""Percent of a core that idle consumers may take."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number and its limit."""

    name: str
    value: float = 0.0
    unit: str = ""
    limit: float | None = None
    """The goal; None: it is only shown."""
    detail: str = ""
    flaw: str | None = None
    """Why the number must not be shown."""

    @property
    def reached(self) -> bool:
        """Whether the number keeps its limit."""
        return self.limit is None or self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What yields one finding or a few; given true, quickly and without meaning."""

    name: str
    title: str
    find: Callable[[bool], Iterator[Finding]]


class Ask(msgspec.Struct):
    """What a fresh process is to find out."""

    what: str
    kind: str = ""
    n: int = 0
    seconds: float = 0.0
    url: str = ""
    prefetch: int | None = None
    module: str = ".answers"
    """Which module's `answer` knows."""


class Growth(msgspec.Struct):
    """Resident memory while messages pass."""

    handled: int
    doubles: int
    samples: list[float]
    """MiB after each fiftieth of the messages."""
    seconds: float

    @property
    def grown(self) -> float:
        """MiB from the end of the first fifth, when every buffer has its size, to the highest sample after it."""
        settled = self.samples[len(self.samples) // 5 :]
        return max(settled) - settled[0]


class Asked:
    """A fresh process that answers a question."""

    def __init__(self, question: Ask) -> None:
        self.process = start("--probe", msgspec.json.encode(question).decode(), stdin=subprocess.PIPE)
        # Nothing here waits for ever.
        self._guard = threading.Timer(600, self.process.kill)
        self._guard.daemon = True
        self._guard.start()

    def wait_ready(self) -> bool:
        """Return whether it says that it is ready, or has ended."""
        return any(line.rstrip() == READY for line in iter(output(self.process).readline, ""))

    def answer(self, type: type[T]) -> T | str:
        """Return its answer, or what went wrong."""
        process = self.process
        try:
            # Closes its input, which tells those that wait for it to come to an end.
            text, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "not done after 300 s"
        finally:
            self._guard.cancel()
            output(process).close()
        lines = text.splitlines()
        if process.returncode or not lines:
            return f"the process failed (exit code {process.returncode})"
        return msgspec.json.decode(lines[-1], type=type)


def ask(question: Ask, type: type[T]) -> T | str:
    """Let a fresh process answer *question*; return what went wrong if it cannot."""
    return Asked(question).answer(type)


def _memory(smoke: bool) -> Iterator[Finding]:
    n = 50_000 if smoke else 1_000_000
    for kind in ("queue", "topic"):
        name = f"growth over {n:,} messages, {kind}{' with a group' if kind == 'topic' else ''}"
        found = ask(Ask("memory", kind, n), Growth)
        if isinstance(found, str):
            yield Finding(name=name, flaw=found)
            continue
        if found.handled != n or found.doubles:
            yield Finding(name=name, flaw=f"{found.handled:,} of {n:,} handled, {found.doubles:,} of them twice")
            continue
        some = found.samples[:: max(1, len(found.samples) // 10)]
        yield Finding(
            name=name,
            value=found.grown,
            unit="MiB",
            limit=GROWTH,
            detail=f"resident MiB on the way: {' '.join(f'{one:.0f}' for one in some)}; {n / found.seconds:,.0f} msgs/s",
        )


def _imports(smoke: bool) -> Iterator[Finding]:
    modules = {"below": "anyio, orjson, msgspec", "brokerkit": "brokerkit"}
    wall: dict[str, list[float]] = {name: [] for name in modules}
    cpu: dict[str, list[float]] = {name: [] for name in modules}
    # The first round is not counted: it compiles, and fills the cache of files.
    for number in range(4 if smoke else 16):
        for name, imported in modules.items():
            clocks = "time.perf_counter(), time.process_time()"
            code = f"import time; a, b = {clocks}; import {imported}; c, d = {clocks}; print(c - a, d - b)"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
            if done.returncode:
                yield Finding(name="import", flaw=f"import {imported} failed")
                return
            if number:
                for took, text in zip((wall, cpu), done.stdout.split(), strict=True):
                    took[name].append(float(text) * 1000)
    below, ours = median(wall["below"]), median(wall["brokerkit"])
    yield Finding(
        name="import brokerkit, beyond anyio, orjson and msgspec",
        value=ours - below,
        unit="ms",
        limit=IMPORT,
        detail=f"medians of {len(wall['below'])} fresh interpreters each: {ours:.1f} ms, {below:.1f} ms; "
        f"of CPU time {median(cpu['brokerkit']):.1f} ms, {median(cpu['below']):.1f} ms",
    )


def _idle(smoke: bool) -> Iterator[Finding]:
    name = "idle consumers of a queue and of a topic, 100 handlers each"
    found = ask(Ask("idle", seconds=0.5 if smoke else 5.0), float)
    if isinstance(found, str):
        yield Finding(name=name, flaw=found)
    else:
        yield Finding(name=name, value=found * 100, unit="% core", limit=IDLE)


ALL: Final = (
    Probe(name="memory", title="memory over many messages", find=_memory),
    Probe(name="import", title="the cost of importing", find=_imports),
    Probe(name="idle", title="the cost of waiting", find=_idle),
)
