"""The tracker of logs against a naive model, and its note against everything that may come out of a broker."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from brokerkit.drivers import _log
from brokerkit.drivers._log import MAX_TEXT, Tracker
from brokerkit.policy import LOG_AHEAD, LOG_WINDOW


def undone(tracker: Tracker) -> dict[int, tuple[bool, int, int]]:
    """Return, for what is not done below high, whether it is in hand, its deliveries and its attempts."""
    return {
        offset: (tracker.holds(offset), tracker.deliveries(offset), tracker.attempts(offset))
        for offset in range(tracker.base, tracker.high)
        if offset not in tracker._done
    }


def same(one: Tracker, two: Tracker) -> bool:
    return (one.base, one.high, undone(one)) == (two.base, two.high, undone(two))


class Model(RuleBasedStateMachine):
    """Every offset has one word; the tracker must say the same."""

    window = LOG_WINDOW

    @initialize(base=st.integers(0, 1000))
    def begin(self, base: int) -> None:
        self.tracker = Tracker(base)
        self.first = base
        self.states: dict[int, str] = {}
        self.counts: dict[int, list[int]] = {}

    @property
    def base(self) -> int:
        offset = self.first
        while self.states.get(offset) == "done":
            offset += 1
        return offset

    @property
    def high(self) -> int:
        return max(self.states, default=self.first - 1) + 1

    @property
    def next(self) -> int:
        return min((offset for offset, state in self.states.items() if state == "waits"), default=self.high)

    def of(self, *states: str) -> list[int]:
        return [offset for offset, state in self.states.items() if state in states]

    @rule()
    def hand_out_the_next(self) -> None:
        offset = self.next
        if offset - self.base >= self.window:
            with pytest.raises(ValueError, match="window"):
                self.tracker.hand_out(offset)
            return
        assert self.tracker.hand_out(offset) == self.counts.get(offset, [0, 0])[0] + 1
        self.states[offset] = "hand"

    @rule(hole=st.integers(1, 20))
    def hand_out_behind_a_hole(self, hole: int) -> None:
        offset = self.high + hole
        if self.base < self.high and offset - self.base >= self.window:
            with pytest.raises(ValueError, match="window"):
                self.tracker.hand_out(offset)
            return
        assert self.tracker.hand_out(offset) == 1
        self.states.update(dict.fromkeys(range(self.high, offset), "done"))
        self.states[offset] = "hand"

    @rule(count=st.integers(0, 20))
    def hand_out_a_run(self, count: int) -> None:
        high = self.high
        if high + count - self.base > self.window:
            with pytest.raises(ValueError, match="window"):
                self.tracker.hand_out_run(count)
            return
        assert self.tracker.hand_out_run(count) == high
        self.states.update(dict.fromkeys(range(high, high + count), "hand"))

    @rule(draw=st.data())
    def hand_out_twice(self, draw: st.DataObject) -> None:
        taken = self.of("hand", "done")
        assume(taken)
        offset = draw.draw(st.sampled_from(taken))
        with pytest.raises(ValueError, match="done or in hand"):
            self.tracker.hand_out(offset)

    @rule(draw=st.data())
    def settle(self, draw: st.DataObject) -> None:
        offset = draw.draw(st.integers(self.first - 2, self.high + 2))
        in_hand = self.states.get(offset) == "hand"
        assert self.tracker.done(offset) is in_hand
        if in_hand:
            self.states[offset] = "done"
            self.counts.pop(offset, None)

    @rule(draw=st.data())
    def release(self, draw: st.DataObject) -> None:
        offset = draw.draw(st.integers(self.first - 2, self.high + 2))
        in_hand = self.states.get(offset) == "hand"
        assert self.tracker.release(offset) is in_hand
        if in_hand:
            self.states[offset] = "waits"

    @rule(draw=st.data(), attempts=st.integers(1, 300))
    def hold(self, draw: st.DataObject, attempts: int) -> None:
        offset = draw.draw(st.integers(self.first - 2, self.high + 2))
        self.tracker.hold(offset, attempts)
        if self.states.get(offset) == "hand":
            self.counts.setdefault(offset, [0, 0])[1] = attempts

    @rule()
    def crash(self) -> None:
        gone = self.of("hand")
        assert self.tracker.crashed() == len(gone)
        for offset in gone:
            self.states[offset] = "waits"
            self.counts.setdefault(offset, [0, 0])[0] += 1

    @rule(draw=st.data())
    def skip(self, draw: st.DataObject) -> None:
        first = draw.draw(st.integers(self.first - 2, self.high))
        end = draw.draw(st.integers(first, self.high + 30))
        lost = [offset for offset in self.of("waits") if first <= offset < end]
        self.states.update(dict.fromkeys(lost, "done"))
        high = self.high
        if self.base < high:
            end = min(end, self.base + self.window)
        beyond = range(high, end)
        self.states.update(dict.fromkeys(beyond, "done"))
        for offset in lost:
            self.counts.pop(offset, None)
        assert self.tracker.skip(first, max(end, first)) == len(lost) + len(beyond)

    @rule()
    def restart(self) -> None:
        text = self.tracker.encode()
        assert text.isascii()
        again = Tracker.decode(self.tracker.base, text)
        assert same(again, self.tracker)
        self.tracker = again

    @invariant()
    def agrees(self) -> None:
        tracker = self.tracker
        assert (tracker.base, tracker.high, tracker.next) == (self.base, self.high, self.next)
        assert tracker.fresh == (not self.of("waits"))
        assert (tracker.in_hand, tracker.waiting) == (len(self.of("hand")), len(self.of("waits")))
        assert tracker.room == self.base + LOG_AHEAD - self.high
        expected = {
            offset: (self.states[offset] == "hand", *self.counts.get(offset, [0, 0]))
            for offset in self.of("hand", "waits")
        }
        assert undone(tracker) == expected
        assert all(self.base <= offset < self.high for offset in tracker._counts), "nothing is kept of what is done"

    @precondition(lambda self: self.base == self.high)
    @invariant()
    def says_nothing_where_there_is_nothing(self) -> None:
        assert self.tracker.encode() == ""
        assert not self.tracker._done
        assert not self.tracker._heap


class TightModel(Model):
    """The same where the window is soon full."""

    window = 24


def test_the_tracker_agrees_with_a_naive_model() -> None:
    run_state_machine_as_test(Model, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))


def test_the_tracker_agrees_with_a_naive_model_where_the_window_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "LOG_WINDOW", TightModel.window)
    run_state_machine_as_test(TightModel, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))


def test_only_what_was_in_hand_counts_when_the_owner_dies() -> None:
    """The second owner of a window takes one suspect; only that one counts when it dies as well."""
    tracker = Tracker(5)
    tracker.hand_out_run(4)
    for crash in (1, 2):
        tracker = Tracker.decode(tracker.base, tracker.encode())
        tracker.crashed()
        assert tracker.hand_out(5) == crash + 1
    tracker.crashed()
    assert [tracker.deliveries(offset) for offset in range(5, 9)] == [3, 1, 1, 1]


def test_a_hole_wider_than_the_window_is_passed_when_nothing_is_in_hand() -> None:
    tracker = Tracker(0)
    tracker.hand_out(0)
    with pytest.raises(ValueError, match="beyond the window"):
        tracker.hand_out(LOG_WINDOW)
    assert (tracker.base, tracker.high) == (0, 1), "an error changes nothing"
    assert tracker.skip(1, 10 * LOG_WINDOW) == LOG_WINDOW - 1
    assert tracker.done(0)
    assert (tracker.base, tracker.high) == (LOG_WINDOW, LOG_WINDOW)
    assert tracker.hand_out(10 * LOG_WINDOW) == 1
    assert (tracker.base, tracker.in_hand) == (10 * LOG_WINDOW, 1)


def test_the_room_is_used_up_by_the_oldest_and_comes_back_with_it() -> None:
    tracker = Tracker(7)
    tracker.hand_out_run(LOG_AHEAD)
    assert tracker.room == 0
    for offset in range(8, 7 + LOG_AHEAD):
        tracker.done(offset)
    assert tracker.room == 0
    tracker.done(7)
    assert (tracker.room, tracker.base) == (LOG_AHEAD, 7 + LOG_AHEAD)


# ---------------------------------------------------------------------- the note


def wild(seed: int, span: int, base: int = 10**12) -> Tracker:
    """Return a tracker in a state that is as hard to write down as it gets."""
    draw = random.Random(seed)
    tracker = Tracker(base)
    tracker.hand_out_run(span)
    share = draw.random()
    for offset in range(base + 1, base + span):
        if draw.random() < share:
            tracker.done(offset)
    for offset in list(undone(tracker)):
        if draw.random() < 0.5:
            tracker.hold(offset, draw.randrange(1, 10**6))
        if draw.random() < 0.5:
            tracker.release(offset)
    if draw.random() < 0.5:
        tracker.crashed()
        for offset in list(undone(tracker)):
            if draw.random() < 0.5:
                tracker.hand_out(offset)
    return tracker


def wilds() -> Iterator[Tracker]:
    for seed in range(4):
        for span in (1, 2, 7, 8, 9, 500, LOG_AHEAD, LOG_WINDOW - 1, LOG_WINDOW):
            yield wild(seed, span)


def test_a_note_always_fits_and_never_forgets_what_is_done() -> None:
    dropped = 0
    for tracker in wilds():
        text = tracker.encode()
        assert len(text) <= MAX_TEXT
        again = Tracker.decode(tracker.base, text)
        assert (again.base, again.high, again._done) == (tracker.base, tracker.high, tracker._done)
        dropped += not same(again, tracker)
    assert dropped, "no state was too much for a note: this test shows nothing"


def test_a_full_window_of_every_second_done_fits_beside_its_counts() -> None:
    tracker = Tracker(0)
    tracker.hand_out_run(LOG_WINDOW)
    for offset in range(1, LOG_WINDOW, 2):
        tracker.done(offset)
    tracker.crashed()
    tracker.hand_out(100)
    text = tracker.encode()
    assert len(text) <= MAX_TEXT
    assert same(Tracker.decode(0, text), tracker)


def test_a_note_fits_where_no_number_is_smaller_than_another() -> None:
    tracker = Tracker(0)
    tracker.hand_out_run(LOG_WINDOW)
    tracker.crashed()
    for offset in range(0, LOG_WINDOW, 2):
        tracker.hand_out(offset)
    again = Tracker.decode(0, text := tracker.encode())
    assert len(text) <= MAX_TEXT
    assert (again.high, again.in_hand) == (LOG_WINDOW, LOG_WINDOW), "all numbers are dropped at once"


def test_what_is_dropped_are_the_smallest_numbers() -> None:
    """The rule: the least t at which it fits, and what is at most t becomes in hand and uncounted."""
    tracker = wild(3, LOG_WINDOW, base=0)
    tracker.crashed()
    guilty = min(undone(tracker))
    tracker.hand_out(guilty)
    tracker.hold(guilty, 10**7)
    before, after = undone(tracker), undone(Tracker.decode(tracker.base, tracker.encode()))
    assert after != before
    kept = {offset for offset in before if after[offset] == before[offset]}
    gone = {offset for offset in before if offset not in kept}
    assert guilty in kept
    assert all(after[offset] == (True, 0, 0) for offset in gone)
    threshold = max(max(before[offset][1:]) for offset in gone)
    assert all(max(before[offset][1:]) > threshold or before[offset] == (True, 0, 0) for offset in kept)
    smaller = max((max(state[1:]) for state in before.values() if max(state[1:]) < threshold), default=-1)
    assert len(f"bk1.{tracker.base}.{tracker.high - tracker.base}..") + len(
        _log._ascii(tracker._runs(smaller))
    ) > MAX_TEXT - len(tracker.encode().split(".")[3]), "one number less would not have fitted"


@given(text=st.one_of(st.none(), st.text(), st.from_regex(_log._FORM, fullmatch=True)), base=st.integers(0, 10**15))
def test_foreign_and_empty_notes_are_none(text: str | None, base: int) -> None:
    tracker = Tracker.decode(base, text)
    assert tracker.base == base
    assert tracker.high - base <= LOG_WINDOW
    assert not tracker.holds(base - 1)
    assert base not in tracker._done


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bk1",
        "bk2.0.4..",
        "bk1.0.4.",
        "bk1.0.4...",
        "bk1.1.4..",
        "bk1.0.0..",
        "bk1.0.16385..",
        "bk1.0.4.AQ.",  # the base itself done
        "bk1.0.4.IA.",  # something at high done
        "bk1.0.4.AgAA.",  # longer than the span
        "bk1.0.4.A.",  # no base64
        "bk1.0.4..FA",  # more states than offsets
        "bk1.0.4..AA",  # a run of nothing
        "bk1.0.4..Ag",  # counts cut off
        "bk1.0.4..gA",  # a number cut off
        "bk1.0.4..____fw",  # a number too big
        " bk1.0.4..",
        "bk1.0.4..\n",
        "bk1.\u0660.4..",
        "bk1.0.4.." + "A" * MAX_TEXT,
    ],
)
def test_a_damaged_note_is_none(text: str) -> None:
    tracker = Tracker.decode(0, text)
    assert (tracker.base, tracker.high, tracker.fresh) == (0, 0, True)


def test_a_good_note_of_the_same_form_is_one() -> None:
    tracker = Tracker.decode(0, "bk1.0.4.Ag.CQ")
    assert (tracker.high, tracker._done, tracker.waiting, tracker.next) == (4, {1}, 2, 0)
    assert Tracker.decode(0, "bk1.0.4..DQ").waiting == 3


@given(seed=st.integers(0, 50), place=st.integers(0, 4000), letter=st.sampled_from("ABCxyz019-_.~"))
@settings(deadline=None, max_examples=60)
def test_a_note_with_a_wrong_letter_never_raises(seed: int, place: int, letter: str) -> None:
    tracker = wild(seed, 300)
    text = tracker.encode()
    place %= len(text)
    again = Tracker.decode(tracker.base, text[:place] + letter + text[place + 1 :])
    assert again.base == tracker.base
    assert again.in_hand + again.waiting == len(undone(again))
    again.crashed()
    while not again.fresh:
        assert again.hand_out(again.next) >= 1


def test_a_tracker_says_what_it_tracks() -> None:
    tracker = Tracker(3)
    tracker.hand_out_run(4)
    tracker.release(5)
    assert repr(tracker) == "<Tracker base=3 high=7 in_hand=3 waiting=1>"
