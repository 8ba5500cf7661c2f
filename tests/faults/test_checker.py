"""The checker bites: each mutation of a good history breaks the promise that it should, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from .checker import Terms, Verdict, check
from .history import Entry, Journal, Reading, What
from .trouble import Fault

History = list[Entry]
KILL = Fault(what="kill", begin=5.0, end=5.0, to="one", moves=True)
TERMS = Terms(ordered=True, partitioned=True, unstored=0.5, takeover=2.0)


def entry(at: float, by: str, what: What, id: str, **more: Any) -> Entry:
    return Entry(at=at, by=by, what=what, of="topic", id=id, **more)


def good() -> History:
    """Return a history of 20 messages of two keys: one fails once, one is doomed, and the consumer is killed with one in hand."""
    entries: History = []

    def run(at: float, by: str, number: int, attempt: int, outcome: What | None, deliveries: int = 1) -> None:
        id = f"m{number}"
        place = f"topic@{number}"
        entries.append(entry(at, by, "started", id, attempt=attempt, deliveries=deliveries, position=place))
        if outcome is not None:
            entries.append(entry(at + 0.04, by, outcome, id, attempt=attempt))

    for number in range(20):
        failures = {3: 1, 7: 3}.get(number, 0)
        key, staged = f"k{number % 2}", number % 4 == 0
        made = {"key": key, "number": number, "failures": failures, "staged": staged}
        entries.append(entry(number / 10, "producer", "publish", f"m{number}", **made))
        entries.append(entry(number / 10 + 0.05, "producer", "confirmed", f"m{number}"))
    for number in range(20):
        at = 3 + number / 5
        by = "one" if at < 5 else "two"
        match number:
            case 3:
                run(at, by, 3, 1, "failed")
                run(at + 0.15, by, 3, 2, "handled")
            case 7:
                for attempt in (1, 2, 3):
                    run(at + attempt / 20 - 0.05, by, 7, attempt, "failed")
            case 9:
                run(4.95, "one", 9, 1, None)
                run(6.0, "two", 9, 1, "handled", deliveries=2)
            case _:
                run(at + (by == "two") * 1.5, by, number, 1, "handled")
    entries.append(entry(8.3, "two", "acked", "m19"))
    return entries


EFFECTS = [f"m{number}" for number in range(0, 20, 4)]


def judge(history: History, **more: Any) -> Verdict:
    options: dict[str, Any] = {"letters": {"topic": ["m7"]}, "effects": {"topic": EFFECTS}, **more}
    faults = options.pop("faults", [KILL])
    return check(history, faults, {"topic": options.pop("terms", TERMS)}, **options)


def test_a_good_history_is_good() -> None:
    verdict = judge(good())
    assert verdict.findings == []
    assert verdict.repeats == {"kill": 1}
    assert (verdict.counts["confirmed"], verdict.counts["runs"]) == (20, 24)
    assert verdict.summary() == "20 confirmed, 24 runs, 0 stalls, 1 repeated after kill"


def without(history: History, id: str, *what: What) -> History:
    return [item for item in history if item.id != id or item.what not in what]


def changed(history: History, id: str, what: What, **more: Any) -> History:
    return [msgspec.structs.replace(item, **more) if item.id == id and item.what == what else item for item in history]


def reported(history: History, id: str, result: What) -> History:
    """Let publishing end otherwise."""
    return [msgspec.structs.replace(i, what=result) if (i.id, i.what) == (id, "confirmed") else i for i in history]


def again(history: History, id: str, at: float, by: str = "two", **more: Any) -> History:
    """Let a message run once more."""
    first = next(item for item in history if item.id == id and item.what == "started")
    run = msgspec.structs.replace(first, at=at, by=by, **more)
    return [*history, run, entry(at + 0.05, by, "handled", id, attempt=run.attempt)]


MUTATIONS: dict[str, tuple[Callable[[History], History], set[str]]] = {
    "never delivered": (lambda h: without(h, "m5", "started", "handled"), {"lost"}),
    "delivered, never handled": (lambda h: without(h, "m5", "handled"), {"stuck"}),
    "dead without having failed": (lambda h: without(h, "m7", "started", "failed"), {"dead"}),
    "never published": (lambda h: [*h, entry(8, "two", "started", "ghost", attempt=1, deliveries=1)], {"unexpected"}),
    "reported as not stored": (lambda h: reported(h, "m5", "refused"), {"refused"}),
    "before its time": (lambda h: changed(h, "m5", "publish", delay=5.0), {"early"}),
    "before it was published": (lambda h: changed(h, "m19", "started", at=1.8), {"early", "order"}),
    "twice without a fault": (lambda h: again(h, "m15", 8.5), {"repeat"}),
    "twice, long after the fault": (lambda h: again(h, "m2", 8.5), {"repeat"}),
    "twice, long before the fault": (lambda h: again(h, "m2", 4.0, "one"), {"repeat"}),
    "after its acknowledgement": (lambda h: again(h, "m19", 8.5), {"repeat", "after ack"}),
    "two acknowledgements": (lambda h: [*h, entry(8.6, "one", "acked", "m19")], {"acked twice"}),
    "stored twice": (lambda h: again(h, "m8", 5.1, "two", position="topic@99"), {"doubled"}),
    "out of order": (
        lambda h: changed(changed(h, "m12", "started", at=7.32), "m12", "handled", at=7.35),
        {"order"},
    ),
    "an attempt too many": (lambda h: changed(h, "m3", "started", attempt=2), {"attempts", "repeat"}),
    "an attempt that cannot be": (lambda h: again(h, "m7", 4.75, "one", attempt=4), {"attempts"}),
    "attempt zero": (lambda h: changed(h, "m6", "started", attempt=0), {"attempts"}),
    "a crash that does not count": (lambda h: changed(h, "m9", "started", deliveries=1), {"deliveries"}),
    "begun by who had lost it": (
        lambda h: again(changed(h, "m13", "started", deliveries=2), "m13", 7.2, "one", deliveries=1),
        {"deliveries", "repeat"},
    ),
    "a delivery counted for nothing": (lambda h: changed(h, "m2", "started", deliveries=2), {"deliveries"}),
    "other content": (lambda h: [*h, entry(8, "two", "corrupt", "m5", text="the body of m6")], {"corrupt"}),
    "a broken program": (lambda h: [*h, entry(8, "two", "problem", "", text="TypeError")], {"problem"}),
    "published twice by the program": (lambda h: [*h, entry(8, "producer", "publish", "m5", key="k1", number=5)], {"problem"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_history_is_not(name: str) -> None:
    mutate, kinds = MUTATIONS[name]
    verdict = judge(mutate(good()))
    assert verdict.kinds() == kinds, verdict.findings


@pytest.mark.parametrize(
    "more, kinds",
    [
        ({"letters": {}}, {"stuck"}),
        ({"letters": {"topic": ["m7", "m7"]}}, {"doubled"}),
        ({"letters": {"topic": ["m7", "m5"]}}, {"dead"}),
        ({"letters": {"topic": ["m7", "ghost"]}}, {"unexpected"}),
        ({"effects": {"topic": EFFECTS[1:]}}, {"lost"}),
        ({"effects": {"topic": [*EFFECTS, "m8"]}}, {"doubled"}),
        ({"effects": {"topic": [*EFFECTS, "m5"]}}, {"unexpected"}),
        ({"effects": {"topic": [*EFFECTS, "ghost"]}}, {"unexpected"}),
    ],
)
def test_what_is_stored_elsewhere_is_checked_too(more: dict[str, Any], kinds: set[str]) -> None:
    assert judge(good(), **more).kinds() == kinds


def fault(**more: Any) -> Fault:
    return Fault(**{"what": "other", "begin": 5.0, "end": 5.5, **more})


@pytest.mark.parametrize(
    "given, explained",
    [
        (fault(to="one"), True),
        (fault(), True),
        (fault(to="two", begin=4.0, end=4.5), False),  # it got the message, and only after its own fault was over
        (fault(to="two", end=6.0), False),  # who wakes knows that others may have what it had
        (fault(to="three"), False),
        (fault(to="three", moves=True), True),
        (fault(to="three", clean=True), True),
        (fault(excuses=False), False),
        (fault(begin=6.5, end=6.6), False),
        (fault(begin=1.0, end=1.1), False),
    ],
)
def test_a_fault_explains_what_it_can_have_caused(given: Fault, explained: bool) -> None:
    kinds = judge(changed(good(), "m9", "started", deliveries=1), faults=[given]).kinds()
    assert kinds == (set() if explained else {"repeat"}), kinds


def test_on_a_queue_no_partition_moves() -> None:
    history = changed(good(), "m9", "started", deliveries=1)
    verdict = judge(history, faults=[fault(to="three", moves=True)], terms=Terms(unstored=0.5, takeover=2.0))
    assert verdict.kinds() == {"repeat"}


def test_a_stall_is_a_fault_of_its_process() -> None:
    history = [*good(), entry(6.2, "one", "stalled", "", took=1.5)]
    verdict = judge(changed(history, "m9", "started", deliveries=1), faults=[])
    assert verdict.findings == []
    assert verdict.repeats == {"stall": 1}


def overtaken(*ids: str) -> History:
    """Return a history in which "one" begins messages one after the other that "two" has got before."""
    history = good()
    for id in ids:
        history = changed(history, id, "started", deliveries=2)
    for number, id in enumerate(ids):
        history = again(history, id, 7.2 + number / 100, "one", deliveries=1)
    return history


@pytest.mark.parametrize(
    "given, kinds",
    [
        (fault(to="one", begin=5.1, end=7.1, stops=True), set()),
        (fault(to="one", begin=5.1, end=7.1), {"repeat", "deliveries"}),  # it ran, and could look at its clock
        (fault(to="two", begin=5.1, end=7.1, stops=True), {"deliveries"}),
        (fault(to="one", begin=7.3, end=7.4, stops=True), {"repeat", "deliveries"}),
    ],
)
def test_a_process_may_be_stopped_between_its_last_look_and_a_handler(given: Fault, kinds: set[str]) -> None:
    terms = Terms(unstored=0.5, takeover=2.0)
    assert judge(overtaken("m13"), faults=[KILL, given], terms=terms).kinds() == kinds


def test_a_stop_lets_one_run_begin_too_late_and_that_at_once() -> None:
    terms = Terms(unstored=0.5, takeover=2.0)
    faults = [KILL, fault(to="one", begin=5.1, end=7.1, stops=True)]
    verdict = judge(overtaken("m11", "m13"), faults=faults, terms=terms)
    assert {finding.id for finding in verdict.findings} == {"m13"}
    later = [*overtaken("m13"), entry(7.15, "one", "ready", "")]
    assert judge(later, faults=faults, terms=terms).kinds() == {"repeat", "deliveries"}
    again = changed(overtaken("m13"), "m13", "started", deliveries=1)  # nothing tells that it had it before
    assert judge(again, faults=faults, terms=terms).kinds() == {"repeat"}


def test_where_notes_are_late_a_first_delivery_just_before_a_kill_may_not_count() -> None:
    history = changed(good(), "m9", "started", deliveries=1)
    late = msgspec.structs.replace(TERMS, uncounted=0.1)
    assert judge(history, terms=late).kinds() == set()
    assert judge(history, terms=msgspec.structs.replace(TERMS, uncounted=0.04)).kinds() == {"deliveries"}
    again = changed(good(), "m9", "started", deliveries=2)
    before = [fault(begin=1.0, end=1.1, excuses=False), KILL]
    assert judge(again, faults=before, terms=late).kinds() == {"deliveries"}  # what has come again is noted in time


COPIED = Terms(unstored=0.5, takeover=2.0, copied=True, atomic=False)
"""Of a queue on Kafka."""


def test_a_server_that_takes_its_time_is_a_fault() -> None:
    history = again(good(), "m13", 8.4, "two", deliveries=2)
    assert judge(history, terms=COPIED).kinds() == {"repeat"}
    slow = changed(history, "m19", "acked", at=9.5)  # begun to be acknowledged at 8.34
    verdict = judge(slow, terms=COPIED)
    assert verdict.findings == []
    assert verdict.repeats == {"kill": 1, "slow server": 1}
    stopped = fault(to="two", begin=8.8, end=9.4, excuses=False)
    assert judge(slow, terms=COPIED, faults=[KILL, stopped]).kinds() == {"repeat"}  # it was not the server
    early = again(good(), "m13", 7.3, "two", deliveries=2)
    assert judge(changed(early, "m19", "acked", at=9.5), terms=COPIED).kinds() == {"repeat"}


@pytest.mark.parametrize(
    "number, at, by, faults, kinds",
    [
        # What "one" held when it was killed may have been on its way back as a copy, which nobody's handler has seen.
        ("m13", 7.2, "two", [KILL], set()),
        ("m13", 7.2, "two", [msgspec.structs.replace(KILL, clean=True)], {"repeat"}),
        ("m13", 7.2, "two", [], {"repeat"}),
        # Before it was there, nobody could.
        ("m13", 7.2, "two", [fault(begin=0.4, end=0.5)], {"repeat"}),
    ],
)
def test_a_copy_and_its_original_may_both_be_left(
    number: str, at: float, by: str, faults: list[Fault], kinds: set[str]
) -> None:
    history = again(without(good(), "m9", "started", "handled"), number, at, by, position="topic@99")
    terms = msgspec.structs.replace(COPIED, unstored=0.1)
    assert judge(history, faults=faults, terms=terms).kinds() - {"lost"} == kinds
    same = again(without(good(), "m9", "started", "handled"), number, at, by)
    assert judge(same, faults=faults, terms=terms).kinds() - {"lost"} == {"repeat"}  # and not the same one twice


def test_a_copy_is_left_once_for_each_fault() -> None:
    history = again(again(good(), "m13", 7.2, position="topic@98"), "m13", 7.4, position="topic@99")
    assert judge(history, terms=COPIED).kinds() == {"repeat"}
    assert (
        judge(history, terms=COPIED, faults=[KILL, fault(begin=6.0, end=6.1, excuses=True, to="three")]).kinds()
        == set()
    )


def test_each_failure_makes_a_copy() -> None:
    # The first attempt of m3 ran again, as its process was killed when the copy was stored: so there are two second ones.
    crash = fault(what="kill", to="one", begin=3.7, end=3.7)
    history = [msgspec.structs.replace(i, by="two") if (i.id, i.attempt) == ("m3", 2) else i for i in good()]
    history = again(history, "m3", 6.0, attempt=1, deliveries=2)
    history = changed_last(history, "m3", what="failed")
    history = again(history, "m3", 6.2, attempt=2, position="topic@99")
    assert judge(history, terms=COPIED, faults=[KILL, crash]).kinds() == set()
    twice = again(history, "m3", 8.4, attempt=2, position="topic@99")
    assert judge(twice, terms=COPIED, faults=[KILL, crash]).kinds() == {"repeat"}


def changed_last(history: History, id: str, **more: Any) -> History:
    """Change the last thing that is said of a message."""
    last = max(index for index, item in enumerate(history) if item.id == id)
    return [*history[:last], msgspec.structs.replace(history[last], **more), *history[last + 1 :]]


def test_what_was_acknowledged_is_one_stored_message() -> None:
    history = changed(good(), "m19", "acked", position="topic@19")
    other = again(history, "m19", 8.5, position="topic@99")
    faults = [KILL, fault(begin=8.0, end=8.1, to="three")]
    assert judge(other, terms=COPIED, faults=faults).kinds() == set()
    assert judge(again(history, "m19", 8.5), terms=COPIED, faults=[fault(begin=8.2, end=8.6)]).kinds() >= {"after ack"}
    acked = [*other, entry(8.6, "two", "acked", "m19", position="topic@99")]
    assert judge(acked, terms=COPIED, faults=faults).kinds() == set()
    acked = [*other, entry(8.6, "two", "acked", "m19", position="topic@19")]
    assert judge(acked, terms=COPIED, faults=faults).kinds() == {"acked twice"}


def test_a_leader_that_moved_counts_from_one_again() -> None:
    history = changed(good(), "m9", "started", deliveries=1)
    moved = fault(begin=5.2, end=5.3, moves=True)
    terms = msgspec.structs.replace(COPIED, resets=True)
    assert judge(history, terms=terms, faults=[KILL, moved]).kinds() == set()
    assert judge(history, terms=terms, faults=[KILL]).kinds() == {"deliveries"}
    assert judge(history, terms=terms, faults=[KILL, fault(begin=6.5, end=6.6, moves=True)]).kinds() == {"deliveries"}
    assert judge(history, terms=COPIED, faults=[KILL, moved]).kinds() == {"deliveries"}


def test_a_copy_that_was_left_need_not_count() -> None:
    # m9 is left twice: the copy has not counted the kill, its original has.
    history = again(changed(good(), "m9", "started", deliveries=1), "m9", 6.5, deliveries=2)
    assert judge(history, terms=COPIED, faults=[KILL, fault(begin=5.9, end=6.0, to="three")]).kinds() == {"repeat"}
    copy = again(changed(good(), "m9", "started", deliveries=1), "m9", 6.5, deliveries=2, position="topic@99")
    assert judge(copy, terms=COPIED, faults=[KILL, fault(begin=5.9, end=6.0, to="three")]).kinds() == set()
    never = again(changed(good(), "m9", "started", deliveries=1), "m9", 6.5, deliveries=1, position="topic@99")
    assert judge(never, terms=COPIED, faults=[KILL, fault(begin=5.9, end=6.0, to="three")]).kinds() == {"deliveries"}


def test_a_fault_may_count_several_times() -> None:
    history = changed(good(), "m13", "started", deliveries=4)
    assert judge(history, faults=[KILL, fault(times=2)], terms=COPIED).kinds() == set()
    assert judge(history, faults=[KILL, fault()], terms=COPIED).kinds() == {"deliveries"}


def test_what_a_server_may_forget_is_not_lost() -> None:
    crash = fault(begin=1.5, end=2.0, loses=0.8)
    history = without(without(good(), "m5", "started", "handled"), "m11", "started", "handled")
    assert judge(history, faults=[KILL, crash]).kinds() == {"lost"}  # m5 was older
    assert judge(without(good(), "m11", "started", "handled"), faults=[KILL, crash]).kinds() == set()
    assert judge(without(good(), "m17", "started", "handled"), faults=[KILL, fault(begin=1, end=1.2, loses=1)]).kinds()
    wiped = fault(begin=1.0, end=1.05, wipes=True, excuses=False)
    assert judge(history, faults=[KILL, wiped]).kinds() == {"lost"}  # m11 was younger
    assert judge(without(good(), "m5", "started", "handled"), faults=[KILL, wiped]).kinds() == set()


def test_what_lies_too_long_is_late() -> None:
    # The last one waits for 6.4 s, none of the others for longer than 5.5 s.
    terms = msgspec.structs.replace(TERMS, prompt=5.5)
    slow = changed(changed(good(), "m19", "started", at=8.35), "m19", "handled", at=8.4)
    assert judge(without(slow, "m19", "acked"), terms=terms).kinds() == {"late"}
    assert judge(good(), terms=msgspec.structs.replace(TERMS, prompt=7.0)).kinds() == set()
    assert judge(good(), terms=msgspec.structs.replace(TERMS, prompt=3.0)).kinds() == {"late"}


def test_what_is_under_way_is_not_lost_yet() -> None:
    assert judge(without(good(), "m5", "started", "handled"), drained=False).kinds() == set()


def test_journals_survive_half_a_line(tmp_path: Any) -> None:
    reading = Reading(tmp_path)
    with Journal(tmp_path / "one.journal", "one") as journal:
        journal.note("started", "queue", "m1", attempt=1)
        assert [item.id for item in reading.more()] == ["m1"]
        journal.note("handled", "queue", "m1")
        with (tmp_path / "one.journal").open("ab") as file:
            file.write(b'{"at":1,"by"')
        assert [item.what for item in reading.more()] == ["handled"]
        with (tmp_path / "one.journal").open("ab") as file:
            file.write(b':"one","what":"acked","id":"m1"}\n')
        assert [item.what for item in reading.more()] == ["acked"]
        assert reading.more() == []
    assert len(reading.entries) == 3
