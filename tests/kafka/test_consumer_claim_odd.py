"""One partition in hand: records that are removed, cannot be read, have no time, or are due later."""

from __future__ import annotations

import pytest

from brokerkit.address import AnyTopic, redrive_queue
from brokerkit.driver import Record
from brokerkit.drivers.kafka import _claim
from brokerkit.drivers.kafka._claim import lease_of
from brokerkit.drivers.kafka._records import Native, record_of

from .test_consumer_claim import TOPIC, FakeLog, Hand

AGAIN = redrive_queue(TOPIC, "billing")


def test_what_is_at_hand_behind_a_lone_record_is_not_lost_when_its_place_in_the_log_is() -> None:
    log = FakeLog(range(3))
    log.add(3, ("bk-deliveries", b"2"))
    for offset in range(4, 10):
        log.add(offset)
    hand = Hand(log)
    hand.take()
    hand.settle(0, 1, 2)
    assert hand.claim.alone
    assert hand.claim.overtaken(10, 12) == 2
    log.end = 12
    assert hand.claim.hand_out_alone(hand.held) is not None
    hand.settle(3)
    assert hand.take() == [4, 5, 6, 7, 8, 9]
    hand.settle(4, 5, 6, 7, 8, 9)
    assert hand.take() == []
    assert hand.claim.note() == (12, "")


def test_a_record_that_cannot_be_read_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(address: AnyTopic, partition: int, native: Native) -> Record:
        if native.offset == 2:
            raise ZeroDivisionError
        return record_of(address, partition, native)

    for offsets in (range(5), (0, 2, 5, 9)):
        hand = Hand(FakeLog(offsets))
        hand.take()
        heir = hand.heir(FakeLog(offsets))
        fresh = Hand(FakeLog(offsets))
        monkeypatch.setattr(_claim, "record_of", broken)
        for each in (fresh, heir):
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    each.take()
        monkeypatch.setattr(_claim, "record_of", record_of)
        for each in (fresh, heir):
            taken = [lease_of(delivery).offset for delivery in each.held.values()]
            assert [*taken, *each.take()] == list(offsets)


def test_a_record_without_a_time_has_a_position() -> None:
    log = FakeLog(range(1))
    log.entries[0].timestamp = None  # type: ignore[assignment] # as before Kafka 0.10
    (delivery,) = Hand(log).deliveries()
    assert delivery.position == "orders[0]@0-0"


# ---------------------------------------------------------------------- the redrive queue, whose records may be due later


def queue(*entries: tuple[int, float]) -> Hand:
    """Return a claim on records with an offset and a delay each, stored at the time 1000."""
    log = FakeLog()
    for offset, delay in entries:
        log.add(offset, ("bk-delay", b"%.3f" % delay), ("bk-time", b"5000"))
    return Hand(log, address=AGAIN)


def test_a_record_that_is_not_due_waits_and_others_go_on() -> None:
    hand = queue((0, 0.0), (1, 5.0), (2, 0.0), (3, 2.0))
    assert hand.take() == [0, 2]
    assert hand.of(0).record.timestamp == 5.0
    hand.now = 1002.0
    assert hand.take() == [3]
    hand.now = 1005.0
    assert hand.take() == [1]
    hand.settle(0, 1, 2, 3)
    assert hand.claim.note() == (4, "")


def test_what_waits_for_its_time_is_not_counted_when_its_owner_dies() -> None:
    hand = queue((0, 5.0), (1, 0.0))
    assert hand.take() == [1]
    log = FakeLog()
    log.add(0, ("bk-delay", b"5"), ("bk-time", b"1"))
    log.add(1)
    heir = hand.heir(log)
    assert heir.take() == [1]
    heir.now = 1005.0
    assert heir.take() == [0]
    assert (heir.of(0).deliveries, heir.of(1).deliveries) == (1, 2)


def test_the_first_time_that_something_is_due_is_known() -> None:
    hand = queue((0, 5.0), (1, 3.0))
    assert hand.take() == []
    assert hand.claim.soon == 1003.0


def mortal(*lives: float | None) -> Hand:
    """Return a claim on records of a queue that live for so long, stored at the time 1000."""
    log = FakeLog()
    for offset, life in enumerate(lives):
        log.add(offset, *(() if life is None else (("bk-ttl", b"%.3f" % life),)))
    return Hand(log, address=AGAIN)


def test_what_has_expired_is_done_and_counted_and_others_go_on() -> None:
    hand = mortal(None, 5.0, 20.0, None)
    hand.now = 1005.0
    assert hand.take() == [0, 2, 3]
    assert hand.claim.expired == 1
    assert hand.of(2).record.expires == 1020.0
    hand.settle(0, 2, 3)
    assert hand.claim.note() == (4, "")


def test_what_expires_while_it_waits_to_be_handed_out_again_is_not() -> None:
    hand = mortal(5.0, 5.0, None)
    assert hand.take() == [0, 1, 2]
    hand.release(0, 1, 2)
    hand.now = 1004.9
    assert hand.take(1) == [0]
    hand.now = 1005.0
    assert hand.take() == [2]
    hand.release(0)
    assert hand.take() == []
    assert hand.claim.expired == 2
    hand.settle(2)
    assert hand.claim.note() == (3, "")


def test_what_has_expired_does_not_come_to_the_next_owner() -> None:
    hand = mortal(5.0, None)
    assert hand.take() == [0, 1]
    log = FakeLog()
    log.add(0, ("bk-ttl", b"5"))
    log.add(1)
    heir = hand.heir(log)
    heir.now = 1006.0
    assert heir.take() == [1]
    assert heir.claim.expired == 1
    heir.settle(1)
    assert heir.claim.note() == (2, "")


def test_while_it_is_not_known_whether_it_has_expired_it_waits() -> None:
    hand = mortal(5.0, None)
    known = hand.watch.wait
    hand.watch.wait = lambda native, expires, seen: known(native, expires, seen) or (expires is not None) * 0.05  # type: ignore[method-assign]
    assert hand.take() == [1]
    assert hand.claim.soon == 1000.05
    hand.watch.wait = known  # type: ignore[method-assign]
    assert hand.take() == [], "it is asked again then, and not before"
    hand.now = 1000.05
    assert hand.take() == [0]
