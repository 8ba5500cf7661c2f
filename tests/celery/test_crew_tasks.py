"""Tasks, from `delay()` to their result."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest

from .journal import now
from .workers import Crew

feature = pytest.mark.feature


@feature("tasks")
def test_a_task_runs_once_and_its_result_comes(crew: Crew) -> None:
    result = crew.send("add", 2, 3)
    assert result.get(timeout=30) == 5
    assert crew.runs([result.id]) == {result.id: 1}


@feature("share")
def test_three_workers_share_the_work_and_each_task_runs_once(crew: Crew) -> None:
    sent = [crew.send("nap", 0.02, ignore_result=True).id for _ in range(150)]
    ends = crew.ended(*sent, timeout=30)
    assert set(crew.runs(sent).values()) == {1}
    shares = {name: sum(end.by == name for end in ends) for name in {worker.name for worker in crew.workers}}
    assert min(shares.values()) >= 15, shares


@feature("retry")
def test_a_task_is_retried_as_often_as_it_asks(crew: Crew) -> None:
    result = crew.send("again", 3)
    assert result.get(timeout=30) == 3
    assert [entry.retries for entry in crew.of(result.id, "began")] == [0, 1, 2, 3]


@feature("retry")
def test_a_task_is_retried_by_itself_after_an_error_that_it_names(crew: Crew) -> None:
    result = crew.send("flaky")
    assert result.get(timeout=30) == 2
    assert crew.runs([result.id]) == {result.id: 3}


@feature("retry")
def test_a_retry_is_not_early(crew: Crew) -> None:
    result = crew.send("again", 1, 1.0)
    assert result.get(timeout=30) == 1
    first, second = crew.of(result.id, "began")
    assert 1.0 <= second.at - first.at < 10.0


@feature("tasks")
def test_an_error_is_the_result_of_the_task(crew: Crew) -> None:
    result = crew.send("fail")
    with pytest.raises(ValueError, match="as it should"):
        result.get(timeout=30)
    assert crew.runs([result.id]) == {result.id: 1}


@feature("countdown")
def test_a_countdown_is_not_early_and_runs_once(crew: Crew) -> None:
    sent = now()
    results = [crew.send("add", 1, number, countdown=1.5) for number in range(10)]
    assert [result.get(timeout=30) for result in results] == [1 + number for number in range(10)]
    for result in results:
        (began,) = crew.of(result.id, "began")
        assert 1.4 <= began.at - sent < 15.0


@feature("countdown")
def test_an_eta_in_another_time_zone_is_kept(crew: Crew) -> None:
    due = time.time() + 1.5
    begin = now()
    zone = timezone(timedelta(hours=9))
    result = crew.send("add", 1, 1, eta=datetime.fromtimestamp(due, zone))
    assert result.get(timeout=30) == 2
    (began,) = crew.of(result.id, "began")
    assert 1.4 <= began.at - begin < 15.0


@feature("countdown")
def test_an_eta_that_has_passed_is_due_at_once(crew: Crew) -> None:
    result = crew.send("add", 1, 1, eta=datetime.now(UTC) - timedelta(days=1))
    assert result.get(timeout=30) == 2


@feature("expires")
def test_an_expired_task_is_revoked_and_does_not_run(crew: Crew) -> None:
    result = crew.send("add", 1, 1, countdown=2, expires=0.5)
    crew.until(lambda: result.state == "REVOKED", 30, lambda: f"state {result.state}")
    assert crew.runs([result.id]) == {result.id: 0}


@feature("expires")
def test_a_task_that_does_not_expire_in_time_runs(crew: Crew) -> None:
    assert crew.send("add", 1, 1, expires=60).get(timeout=30) == 2


@feature("reject", "redelivered")
def test_a_task_that_is_put_back_comes_again_marked_as_redelivered(crew: Crew) -> None:
    result = crew.send("put_back")
    assert result.get(timeout=30) == "second"
    assert [entry.again for entry in crew.of(result.id, "began")] == [False, True]


@feature("reject")
def test_a_task_that_is_rejected_for_good_does_not_come_again(crew: Crew) -> None:
    result = crew.send("drop")
    crew.ended(result.id)
    later = [crew.send("add", 1, number) for number in range(20)]
    assert [each.get(timeout=30) for each in later] == [1 + number for number in range(20)]
    assert crew.runs([result.id]) == {result.id: 1}


@feature("tasks")
def test_a_first_delivery_is_not_marked_as_redelivered(crew: Crew) -> None:
    assert not crew.send("where").get(timeout=30)["redelivered"]
