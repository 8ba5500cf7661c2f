"""One partition in the hands of one owner after the other, at random: nothing is lost, doubled or out of order."""

from __future__ import annotations

import random

import pytest

from brokerkit.drivers.kafka._claim import lease_of
from brokerkit.policy import LONE_DELIVERY

from .test_consumer_claim import FakeLog, Hand


class Play:
    """A log with holes, and what its owners do with it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.stored: list[int] = []
        self.end = 0
        self.removed = 0
        """What lies before it was removed."""
        self.done: set[int] = set()
        self.ownerships: dict[int, int] = {}
        """How many have ended without an outcome."""
        self.hand = Hand(FakeLog())
        self.in_hand: set[int] = set()

    def store(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            self.end += self.random.choice((0, 0, 0, 0, 1, 3))
            self.stored.append(self.end)
            self.hand.log.add(self.end)
            self.end += 1

    def next(self) -> list[int]:
        """Return what has to come, in order."""
        return [o for o in self.stored if o >= self.removed and o not in self.done and o not in self.in_hand]

    def take(self) -> None:
        expected, most = self.next(), self.random.randint(1, 10)
        taken = self.hand.take(most)
        assert taken == expected[: len(taken)], (taken, expected)
        for offset in taken:
            deliveries = self.hand.of(offset).deliveries
            assert deliveries == self.ownerships.get(offset, 0) + 1 < LONE_DELIVERY
        self.in_hand |= set(taken)
        if self.hand.claim.alone:
            self.take_alone()

    def take_alone(self) -> None:
        """Settle what is in hand, then take what has to come alone."""
        for offset in sorted(self.in_hand):
            self.settle(offset)
        delivery = self.hand.claim.hand_out_alone(self.hand.held)
        assert delivery is not None
        offset = lease_of(delivery).offset
        assert offset == self.next()[0]
        assert delivery.deliveries == self.ownerships[offset] + 1 >= LONE_DELIVERY
        self.in_hand.add(offset)

    def settle(self, offset: int) -> None:
        self.hand.settle(offset)
        self.in_hand.discard(offset)
        assert offset not in self.done
        self.done.add(offset)

    def settle_some(self) -> None:
        for offset in self.some():
            self.settle(offset)

    def release_some(self) -> None:
        for offset in self.some():
            self.hand.release(offset)
            self.in_hand.discard(offset)

    def some(self) -> list[int]:
        return [offset for offset in sorted(self.in_hand) if self.random.random() < 0.5]

    def hand_over(self) -> None:
        if self.random.random() < 0.5:
            for offset in sorted(self.in_hand):
                self.hand.release(offset)
        else:
            for offset in self.in_hand:
                self.ownerships[offset] = self.ownerships.get(offset, 0) + 1
        self.in_hand.clear()
        log = FakeLog(self.stored, next=self.end)
        self.hand = self.hand.heir(log)

    def compact(self) -> None:
        """Remove some of what lies in the log and is in nobody's hands, and hand over: a reader has its own buffer."""
        self.hand_over()
        gone = {o for o in self.stored if self.random.random() < 0.2}
        self.stored = [o for o in self.stored if o not in gone]
        self.hand = Hand(FakeLog(self.stored, next=self.end), *self.hand.claim.note())
        for offset in gone:
            self.ownerships.pop(offset, None)

    def overtake(self) -> None:
        """Remove the beginning of the log, and hand over."""
        self.hand_over()
        self.removed = self.random.randint(self.removed, self.end)
        self.stored = [o for o in self.stored if o >= self.removed]
        at = self.hand.claim.start
        self.hand = Hand(FakeLog(self.stored, next=self.end), *self.hand.claim.note())
        if at < self.removed:
            undone = {o for o in range(at, self.removed) if o not in self.done}
            assert self.hand.claim.overtaken(at, self.removed) <= len(undone)

    def finish(self) -> None:
        for offset in sorted(self.in_hand):
            self.settle(offset)
        while self.next():
            before = len(self.done)
            self.take()
            for offset in sorted(self.in_hand):
                self.settle(offset)
            assert len(self.done) > before, "nothing comes any more"
        self.hand.take()
        base, note = self.hand.claim.note()
        assert note == ""
        assert base == self.end or not self.stored


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_whatever_owners_do_everything_is_done_once_and_in_order(first: int) -> None:
    for seed in range(first, first + 100):
        play = Play(seed)
        steps = [play.store, play.take, play.take, play.settle_some, play.settle_some, play.release_some]
        rare = [play.hand_over, play.compact, play.overtake]
        for _ in range(80):
            play.random.choice(steps if play.random.random() < 0.9 else rare)()
        play.finish()
