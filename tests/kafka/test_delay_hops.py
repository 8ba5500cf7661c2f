"""The way of a delayed message through the partitions where it waits, worked out without a broker."""

from __future__ import annotations

import itertools
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from brokerkit.address import Queue
from brokerkit.driver import Delivery, Record
from brokerkit.drivers.kafka._claim import Lease
from brokerkit.drivers.kafka._delay import HELD, SLACK, SMALL, Waiting, hop
from brokerkit.drivers.kafka._records import headers_of, record_of
from brokerkit.drivers.kafka._tiers import TIERS, tier_of, waiting_for
from brokerkit.policy import LONE_DELIVERY, MAX_DELAY

from .test_consumer_claim import FakeLog
from .test_server_time import Clocks

MAILS: Any = Queue("mails", bytes)
WAITING = waiting_for(MAILS)


def stored(record: Record, at: float, *, by_broker: bool = True) -> Any:
    """Return *record* as it is read."""
    headers = tuple(headers_of(record, timed=True))
    return SimpleNamespace(
        offset=0,
        timestamp=int(at * 1000),
        timestamp_type=int(by_broker),
        key=record.key,
        value=record.body,
        headers=headers,
    )


def delivered(native: Any, number: int) -> Delivery:
    claim: Any = SimpleNamespace(number=number)
    return Delivery(record_of(WAITING, number, native), Lease(claim, 0), "", 1, native)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("known", ["exactly", "roughly"])
def test_a_message_arrives_when_it_is_due_and_never_before(seed: int, known: str) -> None:
    chance = random.Random(f"{seed} {known}")
    delay = round(chance.choice((3.0, 70.0, 1000.0, 90_000.0, MAX_DELAY)) * chance.uniform(0.34, 1.0), 3)
    begin = now = 1_700_000_000 + chance.random()
    record = Record(WAITING, "m", b"body", b"k", (("x", b"y"),), 5.0, delay=delay, expires=begin + 1e6, attempts=2)
    hops = 0
    while record.address is WAITING:
        number = tier_of(record.delay)
        native = stored(record, now)
        now = native.timestamp / 1000 + TIERS[number] + chance.random() * 0.03
        told = now if known == "exactly" else now - chance.random() * 0.02
        record = hop(MAILS, delivered(native, number), told)
        hops += 1
        now += chance.random() * 0.01
    assert record.address is MAILS
    arrives = now + record.delay
    assert begin + delay - 0.001 <= arrives <= begin + delay + SLACK + 0.1 + 0.02
    assert record.delay < TIERS[0] - SLACK
    assert hops <= 366 + 24 + 6 + 10 + 6 + 10
    assert (record.id, record.body, record.key, record.timestamp, record.attempts) == ("m", b"body", b"k", 5.0, 2)
    assert record.headers == (("x", b"y"),)
    assert record.expires == pytest.approx(begin + 1e6, abs=0.001)


@pytest.mark.parametrize("seed", range(10))
def test_where_writers_set_the_time_only_waiting_counts(seed: int) -> None:
    chance = random.Random(seed)
    delay = round(chance.uniform(1.0, 5000.0), 3)
    waited = 0.0
    record = Record(WAITING, "m", b"", delay=delay)
    for _ in range(100):
        if record.address is not WAITING:
            break
        number = tier_of(record.delay)
        native = stored(record, chance.uniform(0, 2e9), by_broker=False)
        waited += min(TIERS[number], record.delay)
        record = hop(MAILS, delivered(native, number), chance.uniform(0, 2e9))
    assert delay <= waited + record.delay + 0.001 <= delay + 100 * SLACK


def test_what_bears_no_time_goes_on_at_once() -> None:
    """Another client has put it there."""
    native = stored(Record(WAITING, "m", b""), 1_700_000_000)
    record = hop(MAILS, delivered(native, 3), 1_700_000_000)
    assert (record.address, record.delay) == (MAILS, 0.0)


def test_every_delay_has_a_tier_that_is_no_longer() -> None:
    assert [tier_of(delay) for delay in (1.0, 9.999, 10.0, 59.0, 60.0, 3599.0, 3600.0, 86400.0, MAX_DELAY)] == [
        0, 0, 1, 1, 2, 3, 4, 5, 5,
    ]  # fmt: skip


# ---------------------------------------------------------------------- one partition


class Stage:
    """A partition in which all wait for ten seconds."""

    def __init__(self, *, by_broker: bool = True) -> None:
        self.clocks = Clocks()
        self.log = FakeLog()
        self.end = 0
        self.by_broker = by_broker
        self.held: dict[object, Delivery] = {}
        self.claim = Waiting(WAITING, 1, 0, "", self.clocks.time, lambda number: self.end)
        self.claim.now = lambda: self.clocks.monotonic

    def store(self, count: int = 1, *headers: tuple[str, bytes], delay: float = 10.0, off: float = 0.0) -> None:
        for _ in range(count):
            stamp = int((self.clocks.server + off) * 1000)
            self.log.add(self.end, *(headers or (("bk-delay", b"%.3f" % delay),)), timestamp=stamp)
            self.log.entries[-1].timestamp_type = int(self.by_broker)  # type: ignore[attr-defined]
            self.end += 1

    def take(self, most: int = 500) -> list[int]:
        out: deque[Delivery] = deque()
        self.claim.hand_out(self.log, most, self.held, out)
        return [delivery.token.offset for delivery in out if isinstance(delivery.token, Lease)]

    def settle(self, *offsets: int) -> None:
        for lease in list(self.held):
            if isinstance(lease, Lease) and lease.offset in offsets:
                del self.held[lease]
                assert self.claim.tracker.done(lease.offset)


in_a_loop = pytest.mark.asyncio


@in_a_loop
async def test_nothing_behind_what_is_not_due_is_looked_at() -> None:
    stage = Stage()
    stage.store(3)
    stage.clocks.pass_(4)
    stage.store(3)
    assert stage.take() == []
    assert stage.clocks.time.wanted.is_set(), "what time it is has to be known"
    stage.clocks.tick()
    assert stage.take() == []
    assert stage.claim.tracker.high == 0, "nothing is noted as handed out"
    stage.clocks.pass_(5.9)
    assert stage.take() == []
    stage.clocks.pass_(0.2)
    assert stage.take(2) == [0, 1]
    assert stage.take() == [2]
    stage.clocks.pass_(4.1)
    assert stage.take() == [3, 4, 5]
    stage.settle(*range(6))
    assert stage.claim.note() == (6, "")


@in_a_loop
async def test_the_time_to_look_again_is_told() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store()
    assert stage.take() == []
    left = stage.claim.soon - stage.clocks.monotonic
    assert 9.9 < left < 10.1
    stage.clocks.pass_(left)
    assert stage.take() == [0]


@in_a_loop
async def test_what_has_little_time_left_is_kept_for_that_and_others_pass_it() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store(1, delay=10.6)
    stage.store(1, delay=10.2)
    stage.store(1, delay=10.0)
    stage.store(1, delay=11.5)
    stage.clocks.pass_(10.01)
    assert stage.take() == [2, 3], "what has longer to go waits elsewhere"
    assert 0.18 < stage.claim.soon - stage.clocks.monotonic < 0.2
    stage.clocks.pass_(0.2)
    assert stage.take() == [1]
    stage.clocks.pass_(0.3)
    assert stage.take() == []
    stage.clocks.pass_(0.1)
    assert stage.take() == [0]
    stage.settle(0, 1, 2, 3)
    assert stage.claim.note() == (4, "")


@in_a_loop
async def test_what_is_kept_for_a_while_waits_with_the_next_owner_too() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store(3, delay=10.5)
    stage.clocks.pass_(10.01)
    assert stage.take() == []
    heir = Stage()
    heir.clocks, heir.log, heir.end = stage.clocks, FakeLog(), 0
    heir.claim = Waiting(WAITING, 1, *stage.claim.note(), stage.clocks.time, lambda number: 3)
    heir.claim.now = lambda: stage.clocks.monotonic
    stage.clocks.server -= 10.01
    heir.store(3, delay=10.5)
    stage.clocks.server += 10.01
    assert heir.take() == []
    stage.clocks.pass_(0.51)
    assert heir.take() == [0, 1, 2]
    assert [delivery.deliveries for delivery in heir.held.values()] == [1, 1, 1], "nobody had them"


@in_a_loop
async def test_no_more_is_kept_than_there_is_room_for() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store(HELD + 10, delay=10.5)
    stage.log.entries[5].value = b"x" * (SMALL + 1)
    stage.clocks.pass_(10.01)
    assert stage.take(1000) == [5, *range(HELD + 1, HELD + 10)]
    stage.clocks.pass_(0.5)
    assert len(stage.take(10_000)) == HELD


@in_a_loop
async def test_ticks_are_passed_over() -> None:
    stage = Stage()
    stage.clocks.tick()
    for _ in range(3):
        stage.store(2, ("bk-tick", b"1"))
        stage.store(1)
    stage.clocks.pass_(11)
    assert stage.take() == [2, 5, 8]
    stage.settle(2, 5, 8)
    assert stage.claim.note() == (9, "")


@in_a_loop
async def test_what_its_last_owner_had_in_hand_waits_for_its_time_too() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store(3)
    stage.clocks.pass_(10.1)
    assert stage.take() == [0, 1, 2]
    stage.settle(1)
    heir = Stage()
    heir.clocks = stage.clocks
    heir.claim = Waiting(WAITING, 1, *stage.claim.note(), stage.clocks.time, lambda number: 3)
    heir.claim.now = lambda: stage.clocks.monotonic
    heir.store(3)  # later ones at the same places, to see that it is asked
    assert heir.take() == []
    stage.clocks.pass_(10.1)
    assert heir.take() == [0, 2]


@in_a_loop
async def test_many_deliveries_do_not_make_one_come_alone() -> None:
    stage = Stage()
    stage.clocks.tick()
    stage.store(5, ("bk-delay", b"10"), ("bk-deliveries", b"%d" % (LONE_DELIVERY + 5)))
    stage.clocks.pass_(11)
    assert stage.take() == [0, 1, 2, 3, 4]
    assert not stage.claim.alone


@in_a_loop
@pytest.mark.parametrize("off", [-60.0, 60.0, -1e6])
async def test_the_time_of_a_writer_decides_nothing(off: float) -> None:
    """The topic was made by others, without the setting that it needs."""
    stage = Stage(by_broker=False)
    stage.clocks.tick()
    stage.store(3, off=off)
    assert stage.take() == []
    stage.clocks.pass_(5)
    stage.store(2, off=off)
    assert stage.take() == []  # it is seen how far the log goes by now
    stage.clocks.pass_(4.9)
    assert stage.take() == []
    stage.clocks.pass_(0.2)
    assert stage.take() == [0, 1, 2]
    stage.clocks.pass_(4.8)
    assert stage.take() == []
    stage.clocks.pass_(0.2)
    assert stage.take() == [3, 4]


@in_a_loop
async def test_what_is_remembered_of_such_a_log_is_bounded() -> None:
    stage = Stage(by_broker=False)
    stage.store(1)
    for _ in itertools.repeat(None, 5000):
        stage.store(1)
        assert stage.take() == []
        stage.clocks.pass_(0.001)
    assert len(stage.claim.marks) <= 1001
    stage.clocks.pass_(6.5)
    taken: list[int] = []
    while got := stage.take():
        taken += got
        stage.settle(*got)
    assert taken == list(range(len(taken)))
    assert 1000 < len(taken) <= 1502, "those that were there for ten seconds, or a little more"
