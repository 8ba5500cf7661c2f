"""`Stage`: workers beside a server, what is done to them, and the verdict."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, Self

import msgspec

from brokerkit import Broker, NotFound, connect

from .checker import DEADLY, Finding, Terms, Verdict, check
from .history import Entry, Reading, now
from .start import Order
from .trouble import Fault
from .worker import ATTEMPTS, GROUP, TOPIC, effects, queue

ROOT: Final = Path(__file__).parents[2]
READY: Final = 60.0
"""Seconds until a worker must be ready; it takes half a second."""
DRAIN: Final = 30.0
"""Seconds until everything must be handled after the last fault."""
BOTH: Final = ("queue", "topic")
PATIENCE: Final = float(os.environ.get("BROKERKIT_PATIENCE") or (1 if os.environ.get("BROKERKIT_FAULTS") else 3))
"""All waiting may take so many times as long: beside all other tests the machine has other things to do."""


class Stage:
    """One play: start workers, do harm, `finish`."""

    def __init__(
        self,
        url: str,
        folder: Path,
        seed: int,
        *,
        lease: float,
        long: bool = False,
        of: tuple[str, ...] = BOTH,
        terms: Mapping[str, Terms] | None = None,
        **options: Any,
    ) -> None:
        """*options* are those of each `Order`."""
        self.url = url
        self.of = of
        """What messages flow through."""
        self._terms = terms or {}
        self._options = options
        self.seed = seed
        self.random = random.Random(seed)
        self.faults: list[Fault] = []
        self.lease = lease
        self._long = long
        self._folder = folder
        self._reading = Reading(folder)
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._roles: dict[str, str] = {}
        self._forgets = False
        self._doomed: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers.values():
            if worker.poll() is None:
                worker.kill()
            worker.wait()

    @property
    def entries(self) -> list[Entry]:
        """What the workers have written down, as far as it was read."""
        return self._reading.entries

    def rounds(self, short: Iterable[int], long: Iterable[int]) -> Iterable[int]:
        """Return how often harm is done."""
        return long if self._long else short

    # ------------------------------------------------------------------ workers

    async def start(
        self, *roles: Literal["producer", "service", "hand"], waiting: bool = False, **options: Any
    ) -> list[str]:
        """Start a worker for each role and return their names when all are ready, or at once if they are *waiting*."""
        begin = now()
        names = [self._start(role, options) for role in roles]
        if not waiting:
            await self.ready(*names)
        if roles != ("producer",) * len(roles):
            self.faults.append(Fault(what="a member that joined", begin=begin, end=now(), clean=True))
        return names

    def _start(self, role: Any, options: dict[str, Any]) -> str:
        name = f"{role}{len(self._workers) + 1}"
        order = Order(
            **{"url": self.url, "of": self.of, **self._options, **options},
            role=role,
            name=name,
            folder=str(self._folder),
            seed=self.seed,
            lease=self.lease,
        )
        command = [sys.executable, "-m", "tests.faults.start", msgspec.json.encode(order).decode()]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._workers[name] = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log)
        self._roles[name] = role
        return name

    async def ready(self, *names: str) -> None:
        """Wait until workers are."""
        missing = set(names)

        def seen() -> bool:
            missing.difference_update(entry.by for entry in self._reading.entries if entry.what == "ready")
            return not missing

        await self.until(seen, READY, lambda: f"not ready: {sorted(missing)}")

    def living(self, *roles: str) -> list[str]:
        """Return the workers with one of *roles* that run."""
        return [name for name, worker in self._workers.items() if worker.poll() is None and self._roles[name] in roles]

    @property
    def consumers(self) -> list[str]:
        """The consumers that run."""
        return self.living("service", "hand")

    def kill(self, name: str) -> None:
        """End a worker as ``kill -9`` does."""
        begin = now()
        worker = self._workers[name]
        worker.kill()
        worker.wait()
        self.faults.append(Fault(what="kill", begin=begin, end=now(), to=name, moves=self._roles[name] != "producer"))

    async def fails(self, name: str, text: str, timeout: float) -> None:
        """Wait until a worker fails, as it has to, because of *text*."""
        self._doomed.add(name)
        await self.until(
            lambda: self._workers[name].poll() is not None, timeout, lambda: f"{name} runs on, in spite of {text}"
        )
        said = [entry.text for entry in self.entries if entry.by == name and entry.what == "problem"]
        assert any(text in each for each in said), self.report(f"{name} has not failed because of {text}: {said}")

    def died(self) -> list[str]:
        """Return the workers that were killed by something else than this, since the last call."""
        noted = {fault.to for fault in self.faults if fault.what == "kill"}
        gone = [
            name for name, worker in self._workers.items() if worker.poll() == -signal.SIGKILL and name not in noted
        ]
        for name in gone:
            begin = max((entry.at for entry in self.entries if entry.by == name), default=now())
            self.faults.append(Fault(what="kill", begin=begin, end=now(), to=name, moves=True))
        return gone

    async def letters(self) -> dict[str, list[str]]:
        """Return the ids of the dead letters."""
        async with self.broker() as broker:
            return {name: await self._ids(broker, address) for name, address in self._letters().items()}

    async def freeze(self, name: str, seconds: float) -> None:
        """Stop a worker with SIGSTOP for *seconds*."""
        with self.fault("freeze", to=name, moves=self._roles[name] != "producer", stops=True):
            os.kill(self._workers[name].pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(self._workers[name].pid, signal.SIGCONT)

    async def stop(self, *names: str) -> None:
        """Have workers end by themselves, and wait for that."""
        begin = now()
        workers = {name: self._workers[name] for name in names}
        for worker in workers.values():
            worker.terminate()
        await self.until(
            lambda: all(worker.poll() is not None for worker in workers.values()),
            READY,
            lambda: f"still running: {[name for name, worker in workers.items() if worker.poll() is None]}",
        )
        failed = {name: worker.returncode for name, worker in workers.items() if worker.returncode}
        assert not failed, self.report(f"workers have failed: {failed}")
        if any(self._roles[name] != "producer" for name in names):
            self.faults.append(Fault(what="a member that left", begin=begin, end=now(), clean=True))

    # ------------------------------------------------------------------ faults

    @contextmanager
    def fault(self, what: str, **more: Any) -> Generator[None]:
        """Note that something is done for as long as the block lasts."""
        begin = now()
        index = len(self.faults)
        self.faults.append(Fault(what=what, begin=begin, **more))
        self._forgets = self._forgets or bool(more.get("loses") or more.get("wipes"))
        try:
            yield
        finally:
            self.faults[index] = msgspec.structs.replace(self.faults[index], end=now())

    # ------------------------------------------------------------------ waiting

    async def until(self, held: Callable[[], object], timeout: float, what: Callable[[], str] | str) -> None:
        """Wait until *held* is true of the histories."""
        end = now() + timeout * PATIENCE
        self._reading.more()
        while not held():
            text = what if isinstance(what, str) else what()
            assert now() < end, self.report(f"{text}, after {timeout:g} s")
            self._look()
            await asyncio.sleep(0.03)
            self._reading.more()

    def _look(self) -> None:
        """Fail at once if a worker has failed by itself."""
        dead = {
            name: worker.returncode
            for name, worker in self._workers.items()
            if (worker.poll() or 0) > 0 and name not in self._doomed
        }
        assert not dead, self.report(f"workers have failed: {dead}")

    async def flow(self, count: int = 20, *, timeout: float = 10.0) -> float:
        """Wait until consumers have handled *count* more messages of each, and return how long that took."""
        begin = now()
        self._reading.more()
        left = dict.fromkeys(self.of, count)
        seen = len(self._reading.entries)

        def flowed() -> bool:
            nonlocal seen
            for entry in self._reading.entries[seen:]:
                if entry.what == "handled" and entry.of in left:
                    left[entry.of] -= 1
            seen = len(self._reading.entries)
            return max(left.values()) <= 0

        await self.until(flowed, timeout, lambda: f"consumption does not go on: {left} more wanted")
        return now() - begin

    async def published(self, count: int = 20, *, timeout: float = 10.0) -> None:
        """Wait until *count* more messages of each are stored."""
        self._reading.more()
        seen = len(self._reading.entries)

        def done() -> bool:
            new = self._reading.entries[seen:]
            return all(sum(1 for e in new if e.what == "confirmed" and e.of == name) >= count for name in self.of)

        await self.until(done, timeout, "publishing does not go on")

    def pending(self) -> set[str]:
        """Return the ids of what is stored, or was begun, and is neither handled nor dead."""
        due: set[str] = set()
        done: set[str] = set()
        failures: dict[str, int] = {}
        for entry in self._reading.entries:
            match entry.what:
                case "publish":
                    failures[entry.id] = entry.failures
                case "confirmed" | "started":
                    due.add(entry.id)
                case "handled":
                    done.add(entry.id)
                case "failed" if entry.attempt == ATTEMPTS:
                    done.add(entry.id)
                case _:
                    pass
        return {id for id in due - done if failures.get(id) != DEADLY}

    # ------------------------------------------------------------------ the end

    async def finish(self, *, drain: float = DRAIN, terms: Mapping[str, Terms] | None = None) -> Verdict:
        """Stop the producers, let the consumers handle what is left, and check everything."""
        await self.stop(*self.living("producer"))
        if self._forgets:
            await self._quiet()
        else:
            await self._drain(drain * PATIENCE)
        await self.stop(*self.consumers)
        self._reading.more()
        letters = await self.letters()
        async with self.broker() as broker:
            done = {name: await self._ids(broker, address) for name, address in effects(self.of, self.url).items()}
            left = await self._left(broker)
        entries = [entry for entry in self.entries if entry.what != "problem" or entry.by not in self._doomed]
        verdict = check(entries, self.faults, terms or self.terms(), letters=letters, effects=done)
        verdict.findings += left
        assert not verdict.findings, self.report("promises were broken", verdict)
        return verdict

    def terms(self) -> dict[str, Terms]:
        """Return what is promised."""
        takeover = self.lease + 2.0
        terms = {
            "queue": Terms(attempts=ATTEMPTS, unstored=1.0, takeover=takeover),
            "topic": Terms(attempts=ATTEMPTS, unstored=2.0, takeover=takeover, ordered=True, partitioned=True),
            **self._terms,
        }
        return {name: terms[name] for name in self.of}

    async def _drain(self, patience: float) -> None:
        """Wait until nothing is pending, for longer while it becomes less: the checker says what is missing."""
        begin = now()
        end, left = begin + patience, len(self.pending())
        while left and now() < end:
            self._look()
            await asyncio.sleep(0.05)
            if self._reading.more():
                before, left = left, len(self.pending())
                if left < before:
                    end = max(end, min(now() + patience / 3, begin + 4 * patience))

    async def _quiet(self) -> None:
        """Wait until nothing has been done for longer than a lease: some of what was stored may never come."""
        last, seen = now(), len(self._reading.entries)
        while now() - last < self.lease + 2.0:
            self._look()
            await asyncio.sleep(0.05)
            self._reading.more()
            if len(self._reading.entries) > seen:
                last, seen = now(), len(self._reading.entries)

    @asynccontextmanager
    async def broker(self) -> AsyncGenerator[Broker]:
        """Connect from here."""
        async with connect(self.url) as broker:
            yield broker

    def _letters(self) -> dict[str, Any]:
        letters: dict[str, Any] = {"queue": queue(self.lease).dead_letters, "topic": TOPIC.dead_letters(GROUP)}
        return {name: letters[name] for name in self.of}

    async def _ids(self, broker: Broker, address: Any) -> list[str]:
        try:
            return [stored.id async for stored in broker.browse(address, limit=1_000_000)]
        except NotFound:
            return []  # nothing was ever stored there

    async def _left(self, broker: Broker) -> list[Finding]:
        """Return what has an outcome in no history: the acknowledgement of a handled message is missing."""
        found: list[Finding] = []
        for name in self.of:
            source = broker.backlog(queue(self.lease)) if name == "queue" else broker.backlog(TOPIC, GROUP)
            backlog = await source
            left = (backlog.waiting or 0) + (backlog.in_flight or 0) + (backlog.delayed or 0)
            if left:
                found.append(
                    Finding("unsettled", name, "", f"everybody has left, and {left} are not settled: {backlog}")
                )
        return found

    # ------------------------------------------------------------------ telling

    def report(self, problem: str, verdict: Verdict | None = None) -> str:
        """Say what has happened, with everything that is known of the first messages concerned."""
        start = min((entry.at for entry in self._reading.entries), default=now())
        lines = [f"{problem} (BROKERKIT_SEED={self.seed}, histories and logs in {self._folder})"]
        lines += [
            f"  {fault.begin - start:7.3f} to {fault.end - start:7.3f}: {fault.what} {fault.to or ''}"
            for fault in self.faults
        ]
        if verdict is not None:
            lines.append(verdict.summary())
            for finding in verdict.findings[:20]:
                lines.append(f"  {finding.kind}: {finding.of} {finding.id}: {finding.text}")
            for id in list(dict.fromkeys(finding.id for finding in verdict.findings if finding.id))[:3]:
                lines += ["", *(self._line(entry, start) for entry in self._of(id))]
        lines += ["", "the last lines of each log:"]
        for log in sorted(self._folder.glob("*.log")):
            lines += [f"  {log.stem}: {line}" for line in log.read_text(errors="replace").splitlines()[-6:]]
        return "\n".join(lines)

    def _of(self, id: str) -> list[Entry]:
        return sorted((entry for entry in self._reading.entries if entry.id == id), key=lambda entry: entry.at)

    def _line(self, entry: Entry, start: float) -> str:
        more = {name: value for name, value in msgspec.structs.asdict(entry).items() if value}
        for name in ("at", "by", "what", "id", "of"):
            more.pop(name, None)
        return f"  {entry.at - start:7.3f} {entry.id} {entry.by} {entry.what} {more or ''}"
