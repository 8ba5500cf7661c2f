"""The checker of tasks finds what is wrong, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from .checker import Harm, check
from .journal import Entry, What

MAINS = {"one": 100, "two": 200}


def at(seconds: float, what: What, by: str = "one", pid: int = 0, **more: Any) -> Entry:
    number = pid or (MAINS[by] if what in ("ready", "received") else MAINS[by] + 1)
    return Entry(at=seconds, pid=number, what=what, by=by, id="" if what == "ready" else "task", **more)


READY = [at(0, "ready"), at(0, "ready", "two")]
ONE = [at(1, "received"), at(2, "began"), at(3, "ended", state="SUCCESS")]
CUT = [at(1, "received"), at(2, "began")]
TWO = [at(7, "received", "two"), at(8, "began", "two"), at(9, "ended", "two", state="SUCCESS")]
KILL = Harm(what="kill", begin=2.5, end=2.6, pid=100)


def found(entries: list[Entry], *harm: Harm, stored: bool = True, **options: Any) -> set[str]:
    verdict = check(READY + entries, {"task": stored}, harm, **options)
    return {finding.kind for finding in verdict.findings}


def test_a_task_that_ran_once_is_in_order() -> None:
    assert found(ONE) == set()


def test_a_task_that_never_ran_is_lost() -> None:
    assert found([]) == {"lost"}


def test_a_task_that_nobody_knows_to_be_stored_may_be_lost() -> None:
    assert found([], stored=False) == set()


def test_a_task_that_was_only_received_is_lost() -> None:
    assert found([at(1, "received")]) == {"lost"}


def test_a_task_that_has_failed_is_lost() -> None:
    assert found([*CUT, at(3, "ended", state="FAILURE")]) == {"lost"}


def test_a_task_that_was_cut_off_by_a_kill_is_lost_if_it_is_late() -> None:
    assert found(CUT, KILL) == {"lost"}


def test_a_task_that_was_cut_off_by_a_kill_is_given_up_if_it_is_not_late() -> None:
    assert found(CUT, KILL, late=False) == set()


def test_a_task_that_was_not_begun_when_its_worker_was_killed_is_lost_even_if_it_is_not_late() -> None:
    assert found([at(1, "received")], KILL, late=False) == {"lost"}


def test_a_repeat_without_a_cause_is_found() -> None:
    assert found([*ONE, *TWO]) == {"repeat"}


def test_a_repeat_after_a_kill_is_explained() -> None:
    assert found([*CUT, *TWO], KILL) == set()


def test_a_repeat_is_not_explained_by_the_kill_of_another_worker() -> None:
    assert found([*CUT, *TWO], Harm(what="kill", begin=2.5, end=2.6, pid=200)) == {"repeat"}


def test_a_repeat_is_not_explained_by_a_kill_long_after_the_end() -> None:
    late = Harm(what="kill", begin=5, end=5.1, pid=100)
    assert found([*ONE, *TWO], late) == {"repeat"}
    assert found([*ONE, *TWO], late, unstored=2.5) == set()


def test_a_repeat_is_not_explained_by_a_later_kill() -> None:
    assert found([*CUT, *TWO], Harm(what="kill", begin=8.5, end=8.6, pid=100)) == {"repeat"}


def test_an_early_acknowledgement_leaves_at_the_begin() -> None:
    kill = Harm(what="kill", begin=2.2, end=2.3, pid=100)
    assert found([*CUT, *TWO], kill, late=False, unstored=0.1) == {"repeat"}
    assert found([*CUT, *TWO], kill, late=False, unstored=0.3) == set()


def test_what_was_prefetched_by_a_killed_worker_runs_once_and_explains_one_repeat() -> None:
    fetched = [at(1, "received")]
    assert found([*fetched, *TWO], KILL) == set()
    third = [at(10, "began", "two", 203), at(11, "ended", "two", 203, state="SUCCESS")]
    assert found([*CUT, *TWO, *third], KILL) == {"repeat"}


def test_a_kill_of_a_child_explains_what_that_child_had_begun() -> None:
    child = Harm(what="child", begin=2.5, end=2.6, pid=101)
    assert found([*CUT, *TWO], child) == set()
    assert found([*CUT, *TWO], Harm(what="child", begin=2.5, end=2.6, pid=102)) == {"repeat"}


def test_a_broker_that_was_away_explains_repeats_of_what_was_in_hand() -> None:
    assert found([*ONE, *TWO], Harm(what="broker", begin=2.5, end=5)) == set()
    assert found([*ONE, *TWO], Harm(what="broker", begin=4.5, end=5)) == {"repeat"}


def test_a_worker_that_was_frozen_explains_repeats_of_what_it_had() -> None:
    woke = [*CUT, *TWO, at(10, "ended", state="SUCCESS")]
    assert found(woke, Harm(what="freeze", begin=2.5, end=9.5, pid=100)) == set()


def test_a_task_that_nobody_has_published_is_found() -> None:
    verdict = check(READY + ONE, {}, [])
    assert {finding.kind for finding in verdict.findings} == {"unexpected"}


@pytest.mark.parametrize("again", [False, True])
def test_a_name_that_is_given_again_is_another_worker(again: bool) -> None:
    second = at(4, "ready", pid=300)
    more = [at(5, "received", pid=300), at(6, "began", pid=301), at(7, "ended", pid=301, state="SUCCESS")]
    third = [at(8, "began", "two"), at(9, "ended", "two", state="SUCCESS")] if again else []
    assert found([*CUT, second, *more, *third], KILL) == ({"repeat"} if again else set())


def test_a_worker_that_stood_still_may_run_what_it_had_in_hand_and_others_have_done() -> None:
    late = [at(1, "received"), *TWO, at(10, "began"), at(11, "ended", state="SUCCESS")]
    freeze = Harm(what="freeze", begin=2.5, end=9.5, pid=100)
    assert found(late, freeze) == set()
    assert found(late) == {"repeat"}
    taken_after_it = [at(9.6, "received"), *TWO, at(10, "began"), at(11, "ended", state="SUCCESS")]
    assert found(taken_after_it, freeze) == {"repeat"}
