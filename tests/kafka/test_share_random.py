"""Members of a share group under whatever may happen, in any order: every record is done in the end, and what is ours is ours."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka._cluster import Cluster
from brokerkit.drivers.kafka._share_locks import HELD, Lock

from .reading import cluster
from .share_pretender import SharePretender
from .sharing import Member

pytestmark = pytest.mark.asyncio

LOCK = 0.8
PARTITIONS = 3
LONG = 2.0
"""The longest time that a record is in hand."""


class Worker(Member):
    """Handles what comes, each record for a while of its own."""

    def __init__(self, cluster: Cluster, broker: SharePretender, chance: random.Random, room: int) -> None:
        super().__init__(cluster, "orders", room=room, lock=LOCK, timeout=3.0)
        self.broker = broker
        self.chance = chance
        self.limit = room
        self.handled: Counter[tuple[int, int]] = Counter()
        self.wrong: list[str] = []
        """What was believed to be ours, and was not."""
        self.strict = True

    def arrived(self) -> None:
        loop = asyncio.get_running_loop()
        for lock in self.share.take(self.chance.choice((1, 5, 1000, 1000))):
            self.look(lock)
            loop.call_later(self.chance.random() ** 8 * LONG, self.end, lock)

    def look(self, lock: Lock) -> None:
        """Compare what is believed with what is so."""
        now = asyncio.get_running_loop().time()
        if not self.strict or lock.until <= now or lock.state != HELD:
            return
        entry = self.broker.entries[lock.partition][lock.offset]
        mine = [
            session
            for (_, member), session in self.broker.sessions.items()
            if member == self.share.names.decode()[-22:]
        ]
        if entry.owner not in mine or entry.until < lock.until:
            self.wrong.append(f"{lock} is {entry}")

    def end(self, lock: Lock) -> None:
        self.look(lock)
        if lock.state != HELD:
            return
        self.handled[lock.partition, lock.offset] += 1
        if self.chance.random() < 0.05:
            self.share.release(lock)
        else:
            self.share.accept(lock)
        self.share.room += 1
        self.arrived()

    def lost(self, locks: Sequence[Lock]) -> None:
        super().lost(locks)
        self.share.room += len(locks)


def slow(broker: SharePretender, chance: random.Random) -> Sequence[Callable[[], object]]:
    """Return what may happen that takes nothing from anybody but by time."""
    loop = asyncio.get_running_loop()

    def freeze() -> None:
        if 1 not in broker.frozen:
            broker.freeze()
            loop.call_later(chance.random() * 2 * LOCK, thaw)

    def thaw() -> None:
        if 1 in broker.frozen:
            broker.thaw()

    def wait() -> None:
        patience = broker.patience = asyncio.Event()
        loop.call_later(chance.random() * LOCK, patience.set)

    return (
        freeze,
        wait,
        lambda: broker.refused.append(int(ErrorCode.coordinator_not_available)),
        lambda: broker.refused.append(-int(ErrorCode.coordinator_load_in_progress)),
        lambda: broker.top.append(ErrorCode.group_authorization_failed),
        lambda: broker.put(chance.randrange(1, 60), chance.randrange(PARTITIONS), per_batch=chance.choice((1, 7, 100))),
        lambda: broker.put(200, chance.randrange(PARTITIONS)),
    )


def broken(broker: SharePretender, chance: random.Random) -> Sequence[Callable[[], object]]:
    """Return what may happen besides."""
    sessions = (
        ErrorCode.share_session_not_found,
        ErrorCode.invalid_share_session_epoch,
        ErrorCode.unknown_server_error,
        ErrorCode.not_coordinator,
    )
    leaders = (ErrorCode.not_leader_or_follower, ErrorCode.unknown_topic_or_partition, ErrorCode.kafka_storage_error)

    def steal() -> None:
        log = broker.entries[chance.randrange(PARTITIONS)]
        for entry in chance.sample(log, min(3, len(log))):
            entry.owner = None

    return (
        lambda: broker.cut(chance.choice((1, 2))),
        lambda: broker.top.append(chance.choice(sessions)),
        lambda: broker.wrong.setdefault(chance.randrange(PARTITIONS), deque()).append(chance.choice(leaders)),
        lambda: broker.refused.append(int(chance.choice(leaders))),
        lambda: broker.refused.append(-int(chance.choice(leaders))),
        lambda: broker.move(chance.randrange(PARTITIONS), chance.choice((1, 2))),
        steal,
    )


@asynccontextmanager
async def group(seed: int, *, strict: bool) -> AsyncIterator[tuple[SharePretender, list[Worker], random.Random]]:
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(SharePretender(PARTITIONS, 2, lock=LOCK))
        workers: list[Worker] = []
        for room in (1, 10, 100):
            c = await stack.enter_async_context(cluster(broker.url))
            workers.append(Worker(c, broker, chance, room))
            workers[-1].strict = strict
            await stack.enter_async_context(workers[-1])
        yield broker, workers, chance


async def drained(broker: SharePretender, workers: Sequence[Worker], caplog: pytest.LogCaptureFixture) -> None:
    """Let nothing happen any more, and return when all is done."""
    for node in list(broker.frozen):
        broker.thaw(node)
    if broker.patience is not None:
        broker.patience.set()
    broker.patience = None
    broker.top.clear()
    broker.refused.clear()
    broker.wrong.clear()

    def left() -> list[object]:
        entries = [entry for log in broker.entries for entry in log if not entry.done]
        busy = [each.share for each in workers if each.share.going() or each.share.hand.adrift or each.share.hand.held]
        return [*entries, *busy]

    end = asyncio.get_running_loop().time() + 20
    while left():
        assert asyncio.get_running_loop().time() < end, left()
        await asyncio.sleep(0.02)
    assert not [each for each in caplog.records if each.exc_info and each.name == "brokerkit"], (
        "nothing unforeseen has happened"
    )
    for worker in workers:
        assert worker.share.room == worker.limit
        assert worker.share.untaken() == 0
        assert worker.share.owned_until == math.inf


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_believed_to_be_ours_that_is_not_however_slow_brokers_are(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with group(seed, strict=True) as (broker, workers, chance):
        happens = slow(broker, chance)
        for _ in range(60):
            await asyncio.sleep(chance.random() * 0.1)
            chance.choice(happens)()
        await drained(broker, workers, caplog)
        assert [text for worker in workers for text in worker.wrong] == []
        assert sum(len(worker.handled) for worker in workers) >= sum(map(len, broker.entries))


@pytest.mark.parametrize("seed", range(8))
async def test_all_is_done_in_the_end_whatever_happens(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async with group(seed, strict=False) as (broker, workers, chance):
        happens = (*slow(broker, chance), *broken(broker, chance))
        for _ in range(60):
            await asyncio.sleep(chance.random() * 0.1)
            chance.choice(happens)()
        await drained(broker, workers, caplog)
        handled = sum((worker.handled for worker in workers), Counter[tuple[int, int]]())
        assert len(handled) == sum(map(len, broker.entries))
