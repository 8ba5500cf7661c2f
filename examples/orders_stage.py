"""The demo's stage: shop and service in one process on memory://, on any other broker in two, of which one is killed.

A program of your own needs nothing of this: `brokerkit.run(service, url)` is its main function.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import tempfile
import time
from asyncio.subprocess import Process, create_subprocess_exec
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orders_ledger import Ledger, Report, Station

import brokerkit
from brokerkit import Broker, BrokerError, Letter, Queue, Service, Topic, connect

PATIENCE = 90.0  # seconds: a broker takes up to a lease or a session to notice that a consumer has died


@dataclass
class Run:
    """One run of the demo: its broker, its names there, its files."""

    url: str
    folder: Path
    prefix: str

    @classmethod
    def here(cls) -> Run:
        """Return the run that this process takes part in."""
        return cls(os.environ["DEMO_URL"], Path(os.environ["DEMO_FOLDER"]), os.environ["DEMO_PREFIX"])

    def enter(self) -> None:
        """Let this process and those that it starts take part."""
        os.environ.update(DEMO_URL=self.url, DEMO_FOLDER=str(self.folder), DEMO_PREFIX=self.prefix)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.jsonl", self.prefix)

    def connect(self, ledger: Ledger | None = None) -> Broker:
        # The prefix gives each run topics and queues of its own, so that it counts nothing of an earlier one.
        return connect(self.url, options={"prefix": self.prefix}, on_event=ledger.write if ledger else None)


@dataclass
class Demo:
    """What is performed: *shop* publishes, *service* handles, and *stations* say what must come out."""

    title: str
    service: Service[Any]
    shop: Callable[[Run], Awaitable[None]]
    stations: Sequence[Station]
    source: Mapping[str, bytes]
    """What the shop publishes, by message id; the first station reads it."""
    more: Callable[[Report], None] | None = None
    """Prints and checks what only this demo has."""
    also: Sequence[Topic[Any] | Queue[Any, Any]] = ()
    """Addresses beside those of the stations, to delete at the end."""


def perform(demo: Demo) -> int:
    """Run *demo* on the broker of the command line; return the exit code, 0 if all sums are right."""
    if sys.argv[1:] == ["--serve"]:
        run = Run.here()
        logging.basicConfig(filename=run.folder / "service.log", level=logging.INFO)
        brokerkit.run(demo.service, run.connect(run.ledger))
        return 0
    url = sys.argv[1] if len(sys.argv) > 1 else "memory://"
    with tempfile.TemporaryDirectory(prefix="brokerkit-demo-") as folder:
        # The name lets shop and service, each with a connection of its own, meet in the memory of this process.
        run = Run("memory://demo" if url == "memory://" else url, Path(folder), f"demo-{secrets.token_hex(4)}.")
        run.enter()
        try:
            run.connect()  # no connection yet, but it refuses a wrong URL
            print(demo.title, flush=True)
            return asyncio.run(play(demo, run))
        except BrokerError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2


async def play(demo: Demo, run: Run) -> int:
    ledger = run.ledger
    began = time.monotonic()
    addresses = list(dict.fromkeys([*(station.address for station in demo.stations), *demo.also]))
    killed = 0
    if not run.url.startswith("memory:"):
        async with run.connect() as broker:  # what this broker cannot do it says before anything has begun
            await broker.declare(*sorted(addresses, key=lambda address: isinstance(address, Topic)))
        killed = await apart(demo, run, ledger)
    if not killed:
        await together(demo, run, ledger)
    report = Report(ledger, killed=bool(killed))
    async with run.connect() as broker:
        if killed:
            print(f"The service was killed with {killed} messages to go, and started again.")
        print()
        await tell(demo, report, broker)
        for address in addresses:
            await broker.delete(address)
    print()
    for wrong in report.wrong:
        print(f"WRONG: {wrong}")
    if report.wrong:
        print("The end of the service's log:", *(run.folder / "service.log").read_text().splitlines()[-20:], sep="\n")
    took = time.monotonic() - began
    print(f"The sums {'do not add up' if report.wrong else 'add up'}, after {took:.1f} s on {run.url.split('?')[0]}")
    return 1 if report.wrong else 0


async def together(demo: Demo, run: Run, ledger: Ledger) -> None:
    """Shop and service in this process."""
    logging.basicConfig(filename=run.folder / "service.log", level=logging.INFO)
    async with run.connect(ledger) as broker, demo.service.running(broker):
        await demo.shop(run)
        await finished(demo, ledger)


async def apart(demo: Demo, run: Run, ledger: Ledger) -> int:
    """The service in a process of its own, killed once in the middle; return how much it had left to do then."""
    worker = await start()
    try:
        shop = asyncio.ensure_future(demo.shop(run))
        first = demo.stations[0]
        await until(lambda: len(first.entries(ledger, "Handled")) >= 100, worker)
        worker.kill()
        await worker.wait()
        left = len(first.missing(ledger))
        worker = await start()
        await shop
        await finished(demo, ledger, worker)
        worker.terminate()  # the service drains
        code = await worker.wait()
        if code:
            raise SystemExit(f"the service ended with exit code {code}")
        return left
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


async def start() -> Process:
    return await create_subprocess_exec(sys.executable, sys.argv[0], "--serve")


async def finished(demo: Demo, ledger: Ledger, worker: Process | None = None) -> None:
    await until(lambda: not any(station.missing(ledger) for station in demo.stations), worker)


async def until(condition: Callable[[], bool], worker: Process | None) -> None:
    """Look until *condition* holds, or patience ends: then the sums tell what is missing."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        if worker is not None and worker.returncode is not None:
            raise SystemExit(f"the service ended by itself, with exit code {worker.returncode}")
        await asyncio.sleep(0.05)


async def tell(demo: Demo, report: Report, broker: Broker) -> None:
    letters: dict[str, list[Letter[Any]]] = {}
    for station in demo.stations:
        if isinstance(station.address, Topic):
            dead = station.address.dead_letters(station.group or "")
            backlog = await broker.backlog(station.address, station.group or "")
        else:
            dead = station.address.dead_letters
            backlog = await broker.backlog(station.address)
        letters[station.name] = [letter async for letter in broker.browse(dead, limit=10_000)]
        report.station(station, letters[station.name], backlog)
    if demo.more is not None:
        demo.more(report)
    print("\nWhy")
    for station in demo.stations:
        report.reasons(station, letters[station.name])
    report.unread(letters[demo.stations[0].name], demo.source)
