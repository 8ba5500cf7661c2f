"""Canvas: tasks that are followed by others."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from .workers import Crew

feature = pytest.mark.feature
canvas: Any = import_module("celery")


def s(crew: Crew, name: str, *args: Any, **options: Any) -> Any:
    return crew.app.signature(name, args=args, options=options)


@feature("canvas")
def test_a_chain_passes_results_on(crew: Crew) -> None:
    chain = canvas.chain(s(crew, "add", 1, 2), s(crew, "add", 4), s(crew, "add", 8))
    assert chain.apply_async().get(timeout=30) == 15


@feature("canvas")
def test_a_group_runs_all_its_tasks(crew: Crew) -> None:
    group = canvas.group(s(crew, "add", number, number) for number in range(20))
    assert group.apply_async().get(timeout=30) == [2 * number for number in range(20)]


@feature("canvas")
def test_a_chord_runs_its_body_once_when_all_are_done(crew: Crew) -> None:
    chord = canvas.chord([s(crew, "add", number, 1) for number in range(15)], s(crew, "total"))
    result = chord.apply_async()
    assert result.get(timeout=30) == sum(range(1, 16))
    assert crew.runs([result.id]) == {result.id: 1}


@feature("canvas")
def test_chords_stand_in_chains(crew: Crew) -> None:
    chord = canvas.chord([s(crew, "add", 1), s(crew, "add", 2)], s(crew, "total"))
    chain = canvas.chain(s(crew, "add", 1, 1), chord, s(crew, "add", 100))
    assert chain.apply_async().get(timeout=30) == 107


@feature("canvas")
def test_a_chain_of_groups_goes_on_when_each_group_is_done(crew: Crew) -> None:
    first = canvas.group(s(crew, "add", number, 0) for number in range(5))
    chain = canvas.chain(first, s(crew, "total"), s(crew, "add", 5))
    assert chain.apply_async().get(timeout=30) == 15


@feature("canvas")
def test_a_task_replaces_itself_by_others(crew: Crew) -> None:
    assert crew.send("split", 6).get(timeout=30) == sum(range(1, 7))


@feature("canvas")
def test_a_callback_gets_the_result(crew: Crew) -> None:
    callback = s(crew, "add", 10).set(task_id=canvas.uuid())
    crew.send("add", 1, 2, link=callback)
    assert crew.app.AsyncResult(callback.options["task_id"]).get(timeout=30) == 13


@feature("canvas")
def test_an_errback_runs_when_a_task_fails(crew: Crew) -> None:
    errback = crew.app.signature("size", args=("text",), immutable=True).set(task_id=canvas.uuid())
    crew.send("fail", link_error=errback)
    assert crew.app.AsyncResult(errback.options["task_id"]).get(timeout=30) == 4


@feature("canvas")
def test_a_chain_ends_where_a_task_fails(crew: Crew) -> None:
    last = s(crew, "add", 1, 1)
    result = canvas.chain(s(crew, "add", 1, 1), crew.app.signature("fail", immutable=True), last).apply_async()
    crew.until(lambda: result.parent.state == "FAILURE", 30, lambda: f"state {result.parent.state}")
    assert crew.runs([result.id]) == {result.id: 0}


@feature("canvas")
def test_a_chain_with_countdowns_takes_as_long(crew: Crew) -> None:
    chain = canvas.chain(s(crew, "add", 1, 2), s(crew, "add", 4).set(countdown=1), s(crew, "add", 8).set(countdown=1))
    result = chain.apply_async()
    assert result.get(timeout=30) == 15
    first, last = crew.began(result.parent.parent.id), crew.began(result.id)
    assert last[0].at - first[0].at >= 2.0 - 0.1
