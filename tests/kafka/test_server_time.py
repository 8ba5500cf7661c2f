"""The broker's clock: never ahead of it, however wrong our own clocks are."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from brokerkit.drivers.kafka._time import DRIFT, EXPIRED, KEPT, QUICK, SOON, ServerTime


class Clocks:
    """The broker's clock and both of ours, which move together."""

    def __init__(self, wall: float = 0.0) -> None:
        """Have our wall clock *wall* seconds ahead of the broker's."""
        self.server = 1_000_000.0
        self.monotonic = 50.0
        self.wall = self.server + wall
        self.time = ServerTime()
        self.time._monotonic = lambda: self.monotonic
        self.time._wall = lambda: self.wall

    def pass_(self, seconds: float, rate: float = 1.0) -> None:
        """Let time go by; ours runs at *rate*."""
        self.server += seconds
        self.monotonic += seconds * rate
        self.wall += seconds * rate

    def tick(self, there: float = 0.002, back: float = 0.003) -> None:
        """Write a tick that is on its way for so long."""
        sent = self.monotonic
        self.pass_(there)
        stamp = int(self.server * 1000)
        self.pass_(back)
        self.time.answered(stamp, sent)

    def wait(
        self,
        *,
        appended: float | None = None,
        written: float | None = None,
        delay: float | None = None,
        expires: float | None = None,
        seen: float | None = None,
    ) -> float:
        """Ask about a record with the broker's time, or that of who has written it."""
        at = appended if appended is not None else written if written is not None else self.server
        headers = [] if delay is None else [("bk-delay", b"%.3f" % delay)]
        native: Any = SimpleNamespace(timestamp=int(at * 1000), timestamp_type=int(written is None), headers=headers)
        return self.time.wait(native, expires, self.monotonic if seen is None else seen)


pytestmark = [pytest.mark.asyncio, pytest.mark.parametrize("wall", [0.0, 60.0, -60.0, 7200.0])]


async def test_nothing_is_known_before_the_first_stamp(wall: float) -> None:
    clocks = Clocks(wall)
    assert clocks.time.now() == -float("inf")
    assert not clocks.time.exact
    assert clocks.time.until(0.0) == SOON
    assert clocks.time.wanted.is_set()


async def test_a_tick_tells_the_time_and_is_never_ahead(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.tick()
    assert clocks.time.exact
    assert clocks.server - 0.01 < clocks.time.now() <= clocks.server
    clocks.pass_(KEPT - 1)
    assert clocks.time.exact
    assert clocks.server - 0.01 - KEPT * DRIFT <= clocks.time.now() <= clocks.server <= clocks.time.latest()
    clocks.pass_(2)
    assert not clocks.time.exact


async def test_a_slow_answer_is_no_proof_of_the_time(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.tick(0.0, QUICK + 0.1)
    assert not clocks.time.exact
    assert clocks.server - QUICK - 0.2 < clocks.time.now() <= clocks.server


async def test_stamps_that_are_seen_only_move_it_on(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.observe(int((clocks.server - 5) * 1000))
    assert clocks.time.now() == pytest.approx(clocks.server - 5, abs=0.002)
    clocks.time.observe(int((clocks.server - 9) * 1000))
    assert clocks.time.now() == pytest.approx(clocks.server - 5, abs=0.002)
    clocks.time.observe(int((clocks.server - 1) * 1000))
    assert clocks.time.now() == pytest.approx(clocks.server - 1, abs=0.002)
    assert not clocks.time.exact


async def test_a_stamp_of_the_future_is_not_believed(wall: float) -> None:
    """A broker whose clock was an hour ahead has led the partition before."""
    clocks = Clocks(wall)
    clocks.time.observe(int((clocks.server + 3600) * 1000))
    clocks.tick()
    assert clocks.server - 0.01 < clocks.time.now() <= clocks.server, "a tick is"
    clocks.time.observe(int((clocks.server + 3600) * 1000))
    assert clocks.server - 0.01 < clocks.time.now() <= clocks.server


async def test_a_broker_whose_clock_was_set_back_is_followed(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.tick()
    clocks.server -= 30
    clocks.tick()
    assert clocks.server - 0.01 < clocks.time.now() <= clocks.server


@pytest.mark.parametrize("seed", range(5))
async def test_it_is_never_ahead_whatever_happens(wall: float, seed: int) -> None:
    """Also where our clock runs faster or slower than the broker's, as clocks that are set right do."""
    chance = random.Random(seed)
    clocks = Clocks(wall)
    rate = 1.0 + chance.choice((-DRIFT, 0.0, DRIFT)) * 0.99
    for _ in range(300):
        clocks.pass_(chance.random() ** 3 * 200, rate)
        if chance.random() < 0.3:
            clocks.tick(chance.random() ** 4, chance.random() ** 4)
        elif chance.random() < 0.5:
            clocks.time.observe(int((clocks.server - chance.random() * 100) * 1000))
        assert clocks.time.now() <= clocks.server
        assert clocks.time.latest() >= clocks.server
        point = clocks.server + chance.random() * 10 - 5
        if clocks.time.until(point) == 0:
            assert clocks.server >= point


async def test_a_point_is_reached_only_when_that_is_certain(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.tick()
    point = clocks.server + 10
    assert 9.9 < clocks.time.until(point) < 10.1
    clocks.pass_(clocks.time.until(point))
    assert clocks.time.until(point) == 0.0
    far = clocks.server + 1000
    clocks.pass_(990)
    assert 5 < clocks.time.until(far) < 10, "by then the tick is old"
    clocks.pass_(clocks.time.until(far))
    assert not clocks.time.wanted.is_set()
    assert clocks.time.until(far) == SOON, "a new one is wanted"
    assert clocks.time.wanted.is_set()
    clocks.tick()
    assert clocks.time.until(far) < 1
    clocks.pass_(1)
    assert clocks.time.until(far) == 0.0


async def test_a_machine_that_was_suspended_asks_anew(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.tick()
    clocks.server += 3600
    clocks.wall += 3600  # the monotonic clock of Linux stands meanwhile
    assert not clocks.time.exact
    assert clocks.time.until(clocks.server - 1) == SOON
    assert clocks.time.wanted.is_set()


async def test_who_waits_is_told_of_a_tick(wall: float) -> None:
    clocks = Clocks(wall)
    told: list[bool] = []
    clocks.time.watchers.add(lambda: told.append(clocks.time.exact))
    clocks.tick()
    assert told == [True]


# ---------------------------------------------------------------------- records


async def test_a_short_delay_needs_no_tick_and_is_never_early(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    appended, seen = clocks.server, clocks.monotonic
    assert 0.3 < clocks.wait(appended=appended, delay=0.4) < 0.401
    clocks.pass_(0.39)
    assert 0 < clocks.wait(appended=appended, delay=0.4, seen=seen) < 0.02
    clocks.pass_(0.02)
    assert clocks.wait(appended=appended, delay=0.4, seen=seen) == 0.0
    assert not clocks.time.wanted.is_set()


async def test_what_was_stored_long_ago_waits_no_longer_than_its_delay(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    appended, seen = clocks.server - 500, clocks.monotonic
    assert 0 < clocks.wait(appended=appended, delay=0.4) < 0.401
    clocks.pass_(0.41)
    assert clocks.wait(appended=appended, delay=0.4, seen=seen) == 0.0
    clocks.tick()
    assert clocks.wait(appended=appended, delay=0.4) == 0.0


async def test_the_time_of_a_writer_says_nothing(wall: float) -> None:
    """The topic was made by others, and bears what clients say."""
    clocks = Clocks(wall)
    clocks.tick()
    seen = clocks.monotonic
    for off in (-60, 0, 60):
        assert clocks.wait(written=clocks.server + off, delay=0.4) == pytest.approx(0.4)
    clocks.pass_(0.41)
    assert clocks.wait(written=clocks.server - 60, delay=0.4, seen=seen) == 0.0


async def test_a_long_delay_without_a_tick_is_over_at_last(wall: float) -> None:
    """In a group's private queue, which has no topic for ticks."""
    clocks = Clocks(wall)
    appended = clocks.server - 100
    seen = clocks.monotonic
    assert clocks.wait(appended=appended, delay=300.0) > 0 or wall > 300
    clocks.pass_(301)
    assert clocks.wait(appended=appended, delay=300.0, seen=seen) == 0.0
    if abs(wall) <= 60:
        assert clocks.wait(appended=clocks.server - 1000, delay=300.0) == 0.0, "so late as no clock is wrong"


async def test_whether_a_time_to_live_is_over_is_found_out(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    expires = clocks.server + 10
    assert clocks.wait(expires=expires) == SOON
    assert clocks.time.wanted.is_set()
    clocks.tick()
    assert clocks.wait(expires=expires) == 0.0
    clocks.pass_(9.9)
    assert clocks.wait(expires=expires) == 0.0
    clocks.pass_(0.2)
    assert clocks.wait(expires=expires) == EXPIRED


async def test_what_may_be_over_is_not_handed_out(wall: float) -> None:
    """A tick that took long tells the time only roughly."""
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    expires = clocks.server + 0.5
    clocks.tick(0.0, 0.8)
    assert clocks.server > expires
    seen = clocks.monotonic
    for _ in range(20):
        left = clocks.wait(expires=expires, seen=seen)
        if left == EXPIRED:
            break
        assert left == SOON
        clocks.pass_(left)
    else:
        pytest.fail("it is never known")
    assert clocks.server < expires + 1.5


async def test_what_is_certainly_over_needs_no_tick(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.observe(int(clocks.server * 1000))
    assert clocks.wait(expires=clocks.server - 1) == EXPIRED
    assert not clocks.time.wanted.is_set()


async def test_slow_ticks_tell_what_is_alive_and_what_is_not(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    for _ in range(3):
        clocks.tick(2.0, 1.0)
        assert not clocks.time.exact
        assert clocks.wait(expires=clocks.server + 4) == 0.0
        assert clocks.wait(expires=clocks.server - 4) == EXPIRED
    clocks.tick()
    assert clocks.wait(expires=clocks.server + 0.1) == 0.0
    clocks.tick(2.0, 1.0)
    assert clocks.wait(expires=clocks.server + 0.1) == 0.0, "what was known closely is not forgotten"


async def test_where_no_tick_can_be_had_our_own_clock_decides(wall: float) -> None:
    clocks = Clocks(wall)
    clocks.time.tickers = 1
    assert clocks.wait(expires=clocks.server + 100) == SOON
    clocks.time.tickers = 0
    assert clocks.wait(expires=clocks.wall + 100) == 0.0
    assert clocks.wait(expires=clocks.wall - 1) == EXPIRED
