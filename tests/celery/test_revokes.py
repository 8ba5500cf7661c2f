"""Revoked tasks stay revoked, whatever happens to the workers, and only those."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery.worker import state
from kombu.serialization import dumps

from brokerkit.celery import _revokes
from brokerkit.celery._envelope import pack, seal
from brokerkit.celery._revokes import Revoked, Revokes, is_control, revoked_by

from .channels import Place, Process, body_of, eventually, message

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def nothing_revoked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have nothing revoked, and this process no worker, which other tests may have made of it."""
    monkeypatch.delitem(sys.modules, "celery.worker.consumer.consumer", raising=False)
    state.revoked.clear()
    yield
    state.revoked.clear()


def command(method: str, destination: list[str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Return what Celery's remote control broadcasts."""
    return message(json.dumps({"method": method, "arguments": arguments, "destination": destination}))


async def tell(process: Process, method: str, destination: list[str] | None = None, **arguments: Any) -> None:
    frame = seal(command(method, destination, **arguments), "celery.pidbox", "fanout", "")
    await process.exchanges.publish(frame)


async def worker(process: Process, node: str, *queues: str) -> Any:
    """Begin as Celery's worker does: with its mailbox, and then with its queues."""
    channel = await process.channel()
    box = f"{node}.celery.pidbox"
    await process.exchanges.declare(box, channel.intake, durable=False, auto_delete=True, arguments={"x-expires": 9999})
    await process.exchanges.bind(box, "celery.pidbox", "fanout", "")
    tasks = await process.channel(*queues)
    return channel, tasks


@pytest.mark.parametrize(
    ("method", "arguments", "ids", "stamps"),
    [
        ("revoke", {"task_id": "a"}, ["a"], {}),
        ("revoke", {"task_id": ["a", "b"], "terminate": True, "signal": "TERM"}, ["a", "b"], {}),
        ("terminate", {"task_id": "a", "signal": "KILL"}, ["a"], {}),
        ("revoke_by_stamped_headers", {"headers": {"x": "1", "y": ["2", "3"]}}, [], {"x": ["1"], "y": ["2", "3"]}),
        ("revoke_by_stamped_headers", {"headers": ["x=1", "y=2"]}, [], {"x": ["1"], "y": ["2"]}),
    ],
)
async def test_what_a_command_revokes(
    method: str, arguments: dict[str, Any], ids: list[str], stamps: dict[str, list[str]]
) -> None:
    assert revoked_by(pack(command(method, None, **arguments)), 5.0) == Revoked(5.0, ids, stamps, None)


async def test_other_commands_revoke_nothing() -> None:
    assert revoked_by(pack(command("ping")), 0) is None
    assert revoked_by(pack(command("rate_limit", task_name="revoke")), 0) is None
    assert revoked_by(pack(message('"revoke"')), 0) is None
    assert revoked_by(pack(message("revoke, no JSON")), 0) is None
    assert revoked_by(b"revoke", 0) is None


@pytest.mark.parametrize("arguments", [None, 5, "a", ["a"], [["task_id", "a"]]])
async def test_a_command_with_arguments_of_another_kind_revokes_nothing(arguments: object) -> None:
    body = json.dumps({"method": "revoke", "arguments": arguments, "destination": None})
    assert revoked_by(pack(message(body)), 0) is None


async def test_a_command_whose_method_is_no_text_revokes_nothing() -> None:
    body = json.dumps({"method": ["revoke"], "arguments": {"task_id": "a"}})
    assert revoked_by(pack(message(body)), 0) is None


async def test_a_pickled_command_is_not_read() -> None:
    told = {"method": "revoke", "arguments": {"task_id": "a"}, "destination": None}
    for serializer, wanted in (("json", ["a"]), ("pickle", None)):
        content_type, encoding, body = dumps(told, serializer=serializer)
        made = {**message(body), "content-type": content_type, "content-encoding": encoding}
        found = revoked_by(pack(made), 0)
        assert (None if found is None else found.ids) == wanted, serializer


async def test_only_the_exchange_of_commands_is_one() -> None:
    assert is_control("celery.pidbox")
    assert not is_control("celery")


async def test_a_waiting_task_is_revoked_for_workers_that_start_later(place: Place) -> None:
    async with place.process() as client:
        await client.put("q", "a", "b")
        await tell(client, "revoke", task_id="a")
    async with place.process() as process:
        _, tasks = await worker(process, "w1@host", "q")
        assert sorted(body_of(item) for item in await tasks.take(2)) == ["a", "b"]
        assert list(state.revoked) == ["a"]


async def test_a_running_worker_remembers_what_celery_forgets_after_hours(place: Place) -> None:
    async with place.process() as process, place.process() as client:
        control, tasks = await worker(process, "w1@host", "q")
        await control.intake.consume("w1@host.celery.pidbox", no_ack=True)
        await tell(client, "revoke", task_id="a")
        await control.take(1)
        state.revoked.clear()
        await client.put("q", "a")
        await tasks.take(1)
        assert list(state.revoked) == ["a"]


async def test_a_process_that_is_no_worker_reads_no_revokes(here: Place) -> None:
    async with here.process() as process:
        await tell(process, "revoke", task_id="a")
        await process.put("q", "a")
        await (await process.channel("q")).take(1)
        assert not process.exchanges.revokes
        assert list(state.revoked) == []


async def test_a_revoke_for_other_workers_does_not_count(here: Place) -> None:
    async with here.process() as client:
        await client.put("q", "a", "b")
        await tell(client, "revoke", ["w1@host"], task_id="a")
        await tell(client, "revoke", ["w2@host"], task_id="b")
    async with here.process() as process:
        _, tasks = await worker(process, "w2@host", "q")
        await tasks.take(2)
        assert list(state.revoked) == ["b"]


async def test_an_id_that_is_used_again_later_is_not_revoked(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_revokes, "SLACK", 0.0)
    async with here.process() as process:
        await process.put("q", "before")
        await tell(process, "revoke", task_id=["before", "after"])
        await process.put("q", "after")
        _, tasks = await worker(process, "w1@host", "q")
        items = await tasks.take(2)
        assert list(state.revoked) == ["before"]
        # A copy is as old as what it is a copy of.
        state.revoked.clear()
        tasks.intake.requeue(items)
        await tasks.take(2)
        assert list(state.revoked) == ["before"]


async def test_stamped_tasks_are_revoked(here: Place) -> None:
    async with here.process() as process:
        await process.put("q", "a", stamps={"header": ["1", "2"]}, stamped_headers=["header"])
        await process.put("q", "b", stamps={"header": "3"}, stamped_headers=["header"])
        await process.put("q", "c", stamps={"other": "1"}, stamped_headers=["other"])
        await tell(process, "revoke_by_stamped_headers", headers={"header": ["2", "5"]})
        _, tasks = await worker(process, "w1@host", "q")
        await tasks.take(3)
        assert list(state.revoked) == ["a"]


async def test_what_is_no_revoke_is_passed_over(here: Place, caplog: pytest.LogCaptureFixture) -> None:
    async with here.process() as process:
        await process.broker.publish(process.exchanges.names.revokes, b"{")
        await tell(process, "revoke", task_id="a")
        await process.put("q", "a")
        _, tasks = await worker(process, "w1@host", "q")
        await tasks.take(1)
        await eventually(lambda: list(state.revoked) == ["a"])
    assert any("is no revoke" in record.getMessage() for record in caplog.records)


async def test_the_newest_revokes_are_kept(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_revokes, "MANY", 3)
    monkeypatch.setattr(_revokes, "MANY_STAMPS", 2)
    async with here.process() as process:
        revokes = Revokes(process.broker, process.exchanges.names)
        now = time.time()
        for n in range(5):
            revokes._learn(Revoked(now, [str(n)], {"header": [str(n)]}))
        assert [n for n in range(5) if revokes.look({"id": str(n)}, now)] == [2, 3, 4]
        assert [n for n in range(5) if revokes.look({"id": "x", "stamps": {"header": str(n)}}, now)] == [3, 4]


async def test_revokes_are_read_by_a_worker_that_has_no_remote_control_yet(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gevent it begins beside the tasks, and so behind the first of them."""
    async with place.process() as producer:
        await producer.put("q", "a", "b", "c")
        await tell(producer, "revoke", task_id="a")
        await tell(producer, "revoke", ["w1@h"], task_id="b")
        await tell(producer, "revoke", ["w2@h"], task_id="c")
    async with place.process() as process:
        plain = await process.channel("q")
        got = await plain.take(3)
        assert not state.revoked
        plain.intake.release(got)
        await plain.intake.close()
    monkeypatch.setitem(sys.modules, "celery.worker.consumer.consumer", sys)
    async with place.process() as process:
        channel = await process.channel("q")
        await channel.take(3)
        assert set(state.revoked) == {"a"}
        await worker(process, "w1@h")
        revokes = process.exchanges.revokes
        assert revokes.look({"id": "b"}, time.time())
        assert not revokes.look({"id": "c"}, time.time())
