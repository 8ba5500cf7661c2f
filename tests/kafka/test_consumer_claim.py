"""One partition in hand: what comes out of it, in which order, and what its note says."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import pytest

from brokerkit.address import AnyQueue, AnyTopic, Topic
from brokerkit.driver import Delivery
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.kafka._claim import Claim, Lease, lease_of
from brokerkit.drivers.kafka._records import Native, due
from brokerkit.policy import LOG_AHEAD, LOG_WINDOW

TOPIC = Topic("orders", bytes)


class Entry:
    """A record in a log."""

    def __init__(self, offset: int, headers: Sequence[tuple[str, bytes | None]], timestamp: int) -> None:
        self.offset = offset
        self.timestamp = timestamp
        self.key: bytes | None = None
        self.value: bytes | None = b"v%d" % offset
        self.headers = headers


class FakeLog:
    """A partition of which everything is at hand."""

    def __init__(self, offsets: Iterable[int] = (), *, next: int | None = None) -> None:
        self.entries: deque[Entry] = deque()
        self.next = 0
        for offset in offsets:
            self.add(offset)
        self.end = self.next if next is None else next

    def add(self, offset: int, *headers: tuple[str, bytes | None], timestamp: int = 1_000_000) -> None:
        self.entries.append(Entry(offset, (("bk-id", b"m%d" % offset), *headers), timestamp))
        self.next = self.end = offset + 1

    def take(self, partition: int, most: int) -> list[Native]:
        taken: list[Native] = [self.entries.popleft() for _ in range(min(most, len(self.entries)))]
        return taken

    def next_offset(self, partition: int) -> int:
        return self.entries[0].offset if self.entries else self.end

    def ready(self) -> Collection[int]:
        return [0] if self.entries else []


class Watch:
    """The broker's clock, which is known exactly; ours shows the same."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, native: Native, expires: float | None, seen: float) -> float:
        if expires is not None and self.time >= expires:
            return -1.0
        return max(0.0, (due(native) or 0.0) - self.time)


class Hand:
    """A claim, its log, and what was handed out of it."""

    def __init__(
        self,
        log: FakeLog,
        base: int = 0,
        note: str = "",
        *,
        end: int | None = None,
        address: AnyTopic | AnyQueue = TOPIC,
    ) -> None:
        self.log = log
        self.watch = Watch()
        self.claim = Claim(address, 0, base, note, self.watch, self.watch.now, end)
        while self.log.entries and self.log.entries[0].offset < self.claim.start:
            self.log.entries.popleft()
        self.held: dict[object, Delivery] = {}

    @property
    def now(self) -> float:
        return self.watch.time

    @now.setter
    def now(self, value: float) -> None:
        self.watch.time = value

    def take(self, most: int = 10_000) -> list[int]:
        return [lease_of(delivery).offset for delivery in self.deliveries(most)]

    def deliveries(self, most: int = 10_000) -> list[Delivery]:
        out: deque[Delivery] = deque()
        self.claim.hand_out(self.log, most, self.held, out)
        return list(out)

    def of(self, offset: int) -> Delivery:
        (found,) = [delivery for delivery in self.held.values() if lease_of(delivery).offset == offset]
        return found

    def settle(self, *offsets: int) -> None:
        for offset in offsets:
            del self.held[self.of(offset).token]
            assert self.claim.tracker.done(offset)

    def release(self, *offsets: int) -> None:
        for offset in offsets:
            delivery = self.of(offset)
            del self.held[delivery.token]
            self.claim.hand_back(lease_of(delivery), delivery)

    def heir(self, log: FakeLog) -> Hand:
        """Return what a new owner makes of the note."""
        return Hand(log, *self.claim.note(), address=self.claim.address)


def test_records_come_out_in_order_each_once() -> None:
    hand = Hand(FakeLog(range(10)))
    assert hand.take(4) == [0, 1, 2, 3]
    assert hand.take(100) == [4, 5, 6, 7, 8, 9]
    assert hand.take() == []
    delivery = hand.of(7)
    assert (delivery.record.id, delivery.record.body, delivery.position) == ("m7", b"v7", "orders[0]@1000000-7")
    assert delivery.deliveries == 1
    assert delivery.record.address is TOPIC
    assert isinstance(delivery.native, Entry)


def test_what_is_released_comes_first_and_counts_nothing() -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take(4)
    hand.release(2, 0)
    assert hand.take(1) == [0]
    assert hand.take() == [2, 4, 5]
    assert hand.of(0).deliveries == hand.of(2).deliveries == 1


def test_a_released_record_keeps_the_attempts_that_were_held() -> None:
    hand = Hand(FakeLog(range(1)))
    hand.take()
    hand.claim.tracker.hold(0, 3)
    hand.release(0)
    (again,) = hand.deliveries()
    assert again.record.attempts == 3


def test_a_new_delivery_has_a_lease_of_its_own() -> None:
    hand = Hand(FakeLog(range(1)))
    (old,) = hand.deliveries()
    hand.release(0)
    (new,) = hand.deliveries()
    assert isinstance(old.token, Lease)
    assert old.token is not new.token
    assert old.token != new.token


def test_a_clean_note_hands_out_what_was_not_done_uncounted() -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take(5)
    hand.settle(0, 2)
    hand.release(1, 3, 4)
    heir = hand.heir(FakeLog(range(6)))
    assert heir.take() == [1, 3, 4, 5]
    assert {delivery.deliveries for delivery in heir.held.values()} == {1}


def test_an_owner_that_died_has_counted() -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take(4)
    hand.settle(1)
    hand.claim.tracker.hold(2, 5)
    heir = hand.heir(FakeLog(range(6)))
    assert heir.take() == [0, 2, 3, 4, 5]
    assert [heir.of(n).deliveries for n in (0, 2, 3, 4, 5)] == [2, 2, 2, 1, 1]
    assert heir.of(2).record.attempts == 5


def test_reading_begins_at_the_first_that_waits() -> None:
    hand = Hand(FakeLog(range(600)))
    hand.take(600)
    hand.settle(*range(500))
    assert hand.heir(FakeLog()).claim.start == 500
    hand.settle(*range(500, 600))
    assert hand.heir(FakeLog()).claim.start == 600


def test_many_that_wait_are_read_again_in_pieces() -> None:
    hand = Hand(FakeLog(range(1000)))
    hand.take(1000)
    hand.settle(*range(0, 1000, 2))
    heir = hand.heir(FakeLog(range(1100)))
    assert heir.take(30) == list(range(1, 60, 2))
    assert [*heir.take(), *heir.take()] == [*range(61, 1000, 2), *range(1000, 1100)]


def test_a_released_one_waits_for_one_before_it_that_is_still_to_be_read() -> None:
    hand = Hand(FakeLog(range(5)))
    hand.take(5)
    heir = hand.heir(FakeLog(()))
    heir.log.add(0)
    assert heir.take() == [0]
    heir.release(0)
    assert heir.take() == [0]
    heir.log.add(1)
    heir.log.add(2)
    assert heir.take(1) == [1]
    heir.release(1)
    heir.release(0)
    assert heir.take() == [0, 1, 2]


def test_what_is_not_in_the_log_any_more_is_passed_over() -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take(5)
    heir = hand.heir(FakeLog([1, 4, 7]))  # compacted
    assert heir.take() == [1, 4, 7]
    heir.settle(1, 4, 7)
    assert heir.claim.note() == (8, "")


def test_what_waits_and_is_missing_at_the_end_is_passed_over() -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take(6)
    heir = hand.heir(FakeLog([0], next=6))
    assert heir.take() == [0]
    heir.settle(0)
    assert heir.take() == []
    assert heir.claim.note() == (6, "")


def test_passing_over_thousands_takes_no_time_worth_mentioning() -> None:
    hand = Hand(FakeLog(range(LOG_AHEAD)))
    hand.take()
    heir = hand.heir(FakeLog([LOG_AHEAD]))
    began = time.process_time()
    assert heir.take() == [LOG_AHEAD]
    assert time.process_time() - began < 0.5
    assert heir.claim.tracker.base == LOG_AHEAD


@pytest.mark.parametrize("compacted", [(), (0,), (5,), (0, 1, 2), (3, 4, 5), range(6)])
def test_nothing_else_vanishes_with_what_was_compacted(compacted: Collection[int]) -> None:
    hand = Hand(FakeLog(range(6)))
    hand.take()
    left = [offset for offset in range(10) if offset not in compacted]
    heir = hand.heir(FakeLog(left))
    taken = heir.take()
    assert [*taken, *heir.take()] == left


def test_gaps_do_not_hold_the_position_back() -> None:
    log = FakeLog([0, 1, 5, 6, 9], next=12)
    hand = Hand(log)
    assert hand.take() == [0, 1, 5, 6, 9]
    hand.settle(0, 1, 5, 6, 9)
    assert hand.claim.note() == (10, "")
    assert hand.take() == []
    assert hand.claim.note() == (12, "")


def test_a_gap_behind_what_is_unsettled_is_noted_when_it_is_near() -> None:
    hand = Hand(FakeLog([0, 100]))
    assert hand.take() == [0, 100]
    hand.settle(100)
    heir = hand.heir(FakeLog([0, 100, 101]))
    assert heir.take() == [0, 101]


def test_a_gap_that_is_too_wide_waits_for_what_is_unsettled() -> None:
    hand = Hand(FakeLog([0, LOG_WINDOW + 10, LOG_WINDOW + 11]))
    assert hand.take() == [0]
    assert hand.claim.standing
    assert hand.claim.full
    assert hand.take() == []
    hand.settle(0)
    assert not hand.claim.full
    assert hand.take() == [LOG_WINDOW + 10, LOG_WINDOW + 11]


def test_a_window_that_is_full_stands_until_the_oldest_is_settled() -> None:
    hand = Hand(FakeLog(range(LOG_AHEAD + 10)))
    assert hand.take() == list(range(LOG_AHEAD))
    assert not hand.claim.standing
    assert hand.take() == []
    assert hand.claim.standing
    hand.settle(*range(1, 100))
    assert hand.claim.full
    hand.settle(0)
    assert not hand.claim.full
    assert hand.take() == list(range(LOG_AHEAD, LOG_AHEAD + 10))


def test_a_full_window_with_nothing_behind_it_does_not_stand() -> None:
    hand = Hand(FakeLog(range(LOG_AHEAD)))
    hand.take()
    assert hand.take() == []
    assert not hand.claim.standing


def test_a_record_that_came_for_the_third_time_waits_to_come_alone() -> None:
    log = FakeLog([0, 1])
    log.add(2, ("bk-deliveries", b"2"))
    log.add(3)
    hand = Hand(log)
    assert hand.take() == [0, 1]
    assert hand.claim.alone
    assert hand.take() == []
    hand.settle(0, 1)
    delivery = hand.claim.hand_out_alone(hand.held)
    assert delivery is not None
    assert (lease_of(delivery).offset, delivery.deliveries) == (2, 3)
    assert not hand.claim.alone
    assert hand.take() == [3]
    assert hand.of(3).deliveries == 1


def test_what_lies_behind_a_lone_record_is_not_noted() -> None:
    log = FakeLog([0])
    log.add(1, ("bk-deliveries", b"7"))
    log.add(2)
    hand = Hand(log)
    hand.take()
    hand.settle(0)
    hand.claim.hand_out_alone(hand.held)
    heir = hand.heir(FakeLog([1, 2]))  # this log does not say what the copy's header said
    heir.take()
    assert [heir.of(n).deliveries for n in (1, 2)] == [2, 1]


def test_two_deaths_make_a_record_come_alone() -> None:
    hand = Hand(FakeLog(range(3)))
    hand.take(2)
    hand.settle(0)
    second = hand.heir(FakeLog(range(3)))
    assert second.take(1) == [1]
    third = second.heir(FakeLog(range(3)))
    assert third.take() == []
    assert third.claim.alone
    delivery = third.claim.hand_out_alone(third.held)
    assert delivery is not None
    assert delivery.deliveries == 3
    assert third.take() == [2]


def test_nothing_is_handed_out_alone_that_need_not_be() -> None:
    hand = Hand(FakeLog(range(2)))
    hand.take()
    hand.release(0)
    assert hand.claim.hand_out_alone(hand.held) is None
    assert hand.take() == [0]


def test_it_ends_where_it_is_to_end() -> None:
    hand = Hand(FakeLog(range(10)), end=6)
    assert not hand.claim.ended
    assert hand.take(4) == [0, 1, 2, 3]
    assert hand.take() == [4, 5]
    assert hand.claim.ended
    assert hand.take() == []
    assert not hand.claim.standing
    hand.release(2)
    assert not hand.claim.ended
    assert hand.take() == [2]


def test_it_ends_in_a_gap() -> None:
    hand = Hand(FakeLog([0, 1, 8, 9]), end=5)
    assert hand.take() == [0, 1]
    assert hand.claim.ended
    hand.settle(0, 1)
    assert hand.claim.note() == (5, "")


def test_it_ends_behind_the_last_record_when_only_markers_follow() -> None:
    hand = Hand(FakeLog([0, 1], next=4), end=4)
    assert hand.take() == [0, 1]
    assert not hand.claim.ended
    assert hand.take() == []
    assert hand.claim.ended


def test_overtaken_while_nothing_is_in_hand() -> None:
    hand = Hand(FakeLog())
    assert hand.claim.overtaken(0, 7) == 7
    assert hand.claim.note() == (7, "")


def test_overtaken_behind_what_is_in_hand() -> None:
    hand = Hand(FakeLog(range(3)))
    hand.take()
    assert hand.claim.overtaken(3, 10) == 7
    hand.settle(0, 1, 2)
    assert hand.claim.note() == (10, "")


def test_overtaken_too_far_ahead_of_what_is_in_hand() -> None:
    hand = Hand(FakeLog(range(1)))
    hand.take()
    far = 3 * LOG_WINDOW
    assert hand.claim.overtaken(1, far) == far - 1
    hand.log.add(far)
    assert hand.take() == []
    assert hand.claim.standing
    hand.settle(0)
    assert hand.take() == [far]
    hand.settle(far)
    assert hand.claim.note() == (far + 1, "")


def test_overtaken_while_reading_again_counts_what_was_not_done() -> None:
    hand = Hand(FakeLog(range(10)))
    hand.take(8)
    hand.settle(1, 2)
    heir = hand.heir(FakeLog())
    assert heir.claim.overtaken(0, 9) == 7  # 0, 3 to 7, and 8, which was never handed out
    heir.log.add(9)
    assert heir.take() == [9]
    heir.settle(9)
    assert heir.claim.note() == (10, "")


def test_what_is_released_is_not_lost_when_its_place_in_the_log_is() -> None:
    hand = Hand(FakeLog(range(3)))
    hand.take()
    hand.release(1)
    assert hand.claim.overtaken(3, 5) == 2
    assert hand.take() == [1]


@pytest.mark.parametrize("note", ["bk1.5.3..", "nonsense", "bk1.0.99999999.."])
def test_a_note_of_somebody_else_is_none(note: str) -> None:
    hand = Hand(FakeLog(range(3)), 0, note)
    assert hand.take() == [0, 1, 2]
    assert {delivery.deliveries for delivery in hand.held.values()} == {1}


def test_the_note_never_passes_what_is_unsettled() -> None:
    hand = Hand(FakeLog(range(50)))
    hand.take()
    hand.settle(*range(10, 50))
    base, note = hand.claim.note()
    assert base == 0
    tracker = Tracker.decode(base, note)
    assert (tracker.high, tracker.in_hand) == (50, 10)
