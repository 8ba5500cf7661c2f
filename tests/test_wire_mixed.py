"""The client of docs/wire-format.md and brokerkit work on one queue and in one group at once: all is done, once, in order."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from brokerkit import Message, Queue, Service, Topic, connect
from tests.servers import FLAVORS, Flavor, shared
from tests.wire_client import Client, Member, Session

COUNT = 3000
KEYS = 20
JOBS = Queue("jobs", bytes)
STEPS = Topic("steps", bytes)


class Shared:
    """What was done, by whom ever."""

    def __init__(self) -> None:
        self.done: list[str] = []
        """Ids of jobs."""
        self.seen: list[tuple[str, str]] = []
        """Keys and ids of steps."""
        self.stop = threading.Event()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def tell(self) -> None:
        """Something was done: in any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def everything(self) -> None:
        """Return when everything was done at least once."""
        while len(set(self.done)) < COUNT or len(set(self.seen)) < COUNT:
            await self._changed.wait()
            self._changed.clear()


def take_part(client: Client, shared: Shared, draw: random.Random) -> None:
    """Take and settle, and now and then hand back, leave, or forget what was taken."""
    session = Session(client, "bk:{jobs}")
    while not shared.stop.is_set():
        taken = session.take(draw.randint(1, 20))
        if not taken:
            continue
        match draw.randrange(8):
            case 0:
                assert session.recover() == []
            case 1:
                session.leave()
                session = Session(client, "bk:{jobs}")
            case _:
                some = draw.randint(1, len(taken))
                assert session.settle(*taken[:some]) == 1
                shared.done += [each.record.id for each in taken[:some]]
                shared.tell()
                assert session.release(*taken[some:]) == len(taken) - some
    session.leave()


def read_along(client: Client, shared: Shared, draw: random.Random) -> None:
    """Join the group, read a little, give up what others want, leave, and begin again."""
    while not shared.stop.is_set():
        member = Member(client, "bk:{steps}", "group")
        for _ in range(draw.randint(3, 20)):
            shared.seen += [
                ((record.key or b"").decode(), record.id) for _, _, record in member.read(draw.randint(1, 30))
            ]
            shared.tell()
            assert member.commit() == [b"done"]
            surplus = member.sync()
            if surplus:
                member.sync(*list(member.parts.values())[:surplus])
        member.leave()


@contextmanager
def threads(url: str, shared: Shared) -> Iterator[None]:
    """Run two clients of each kind beside the test, and fail if one does."""
    problems: list[BaseException] = []

    def run(work: Callable[[Client, Shared, random.Random], None], seed: int) -> None:
        client = Client(url)
        try:
            work(client, shared, random.Random(seed))
        except BaseException as error:
            problems.append(error)
        finally:
            client.close()

    running = [threading.Thread(target=run, args=(work, seed)) for work in (take_part, read_along) for seed in (1, 2)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        shared.stop.set()
        for thread in running:
            thread.join()
    assert not problems


@pytest.mark.asyncio
@pytest.mark.parametrize("flavor", FLAVORS)
async def test_what_is_shared_is_done_once_and_in_order(flavor: Flavor) -> None:
    server, all_ = shared(flavor), Shared()
    server.clear()
    ours: Counter[str] = Counter()
    service = Service("service")

    @service.subscribe(JOBS, concurrency=8)
    async def work(message: Message[bytes]) -> None:
        all_.done.append(message.id)
        ours["jobs"] += 1
        all_.tell()

    @service.subscribe(STEPS, group="group", concurrency=4)
    async def step(message: Message[bytes]) -> None:
        all_.seen.append((str(message.key), message.id))
        ours["steps"] += 1
        all_.tell()

    async with connect(server.url()) as broker:
        for address in (JOBS, STEPS):
            await broker.declare(address)
        with threads(server.url(), all_):
            async with service.running(broker), asyncio.timeout(60):
                for first in range(0, COUNT, 50):
                    numbers = range(first, first + 50)
                    await broker.publish_many(JOBS, [JOBS.outgoing(b"", id=f"{n}") for n in numbers])
                    items = [STEPS.outgoing(b"", id=f"{n}", key=f"{n % KEYS}") for n in numbers]
                    await broker.publish_many(STEPS, items)
                await all_.everything()
    assert sorted(all_.done, key=int) == [f"{n}" for n in range(COUNT)]
    for key in range(KEYS):
        came = [id for mine, id in all_.seen if mine == f"{key}"]
        assert came == [f"{n}" for n in range(key, COUNT, KEYS)], "once, and in the order of publishing"
    assert 0 < ours["jobs"] < COUNT
    assert 0 < ours["steps"] < COUNT
