"""Where messages go by exchanges, and what happens to those that go nowhere, as Kombu and Celery see it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue
from kombu.common import Broadcast
from kombu.pidbox import Mailbox

from brokerkit.celery import _bridge, _exchanges
from brokerkit.errors import NotFound

from .channels import SYSTEMS, Place, placed
from .reader import WAIT, Reader


@pytest.fixture(params=SYSTEMS)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(_bridge, "LINGER", 0.0)
    with placed(request.param) as made:
        yield made
        end = time.monotonic() + WAIT
        # Else they make anew what is removed now.
        while set(bridges).intersection(_bridge._bridges._open.values()) or _bridge._bridges._closing:
            assert time.monotonic() < end
            time.sleep(0.01)
        bridges.clear()


bridges: list[_bridge.Bridge] = []


def connect(place: Place, process: int = 0) -> Any:
    """Return a connection; with another *process* it shares nothing, as other options are another bridge."""
    options = {"prefix": place.prefix, "eta_window": 60 - process}
    connection: Any = Connection(f"brokerkit+{place.url}", transport_options=options)
    connection.connect()
    bridges.append(connection.transport.bridge)
    return connection


def test_a_queue_that_another_process_deletes_is_bound_when_it_is_declared_again(place: Place) -> None:
    """Else what is published to its exchange goes nowhere, for as long as the connection lasts."""
    queue = Queue("shared", Exchange("news", "topic"), routing_key="a.#")
    with connect(place) as one, connect(place, 1) as other:
        channel = one.channel()
        queue(channel).declare()
        for n in range(2):
            queue(other.channel()).delete()
            assert queue(channel).queue_declare() == ("shared", 0, 0)  # it exists again
            queue(channel).declare()
            Producer(channel).publish(n, exchange=queue.exchange, routing_key="a.b")
            reader = Reader(other, queue)
            assert [message.payload for message in reader.read(1)] == [n]
            reader.channel.close()


def send(connection: Any, exchange: str, key: str, **headers: Any) -> None:
    """Publish to *exchange*; a task, if there are *headers*."""
    Producer(connection.channel()).publish("body", exchange=exchange, routing_key=key, headers=headers)


def warned(caplog: pytest.LogCaptureFixture) -> int:
    return sum("no queue is bound to exchange" in record.getMessage() for record in caplog.records)


def test_a_task_that_no_queue_gets_is_an_error(place: Place) -> None:
    queue = Queue("bound", Exchange("jobs", "topic"), routing_key="a.*")
    with connect(place) as worker, connect(place, 1) as producer:
        with pytest.raises(NotFound, match="exchange 'nowhere' with the routing key 'k': the task is not published"):
            send(producer, "nowhere", "k", task="add", id="1")
        queue(worker.channel()).declare()
        send(producer, "jobs", "a.b", task="add", id="2")
        with pytest.raises(NotFound, match="'c'"):
            send(producer, "jobs", "c", task="add", id="3")
        assert [message.headers["id"] for message in Reader(worker, queue).read(1)] == ["2"]


def test_a_binding_that_was_made_just_now_is_found(place: Place) -> None:
    """Nobody waits until what is published there knows of it."""
    with connect(place) as worker, connect(place, 1) as producer:
        channel = worker.channel()
        for n in range(5):
            queue = Queue(f"bound {n}", Exchange("jobs"), routing_key=str(n))
            queue(channel).declare()
            send(producer, "jobs", str(n), task="add", id=str(n))
            reader = Reader(worker, queue)
            assert [message.headers["id"] for message in reader.read(1)] == [str(n)]


def test_a_task_for_whoever_listens_needs_no_queue(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with connect(place) as worker, connect(place, 1) as producer:
        box = Broadcast("everybody")
        reader = Reader(worker, box, no_ack=True)
        send(producer, box.exchange.name, "", task="add", id="1")  # as Celery does, which declares nothing here
        assert [message.headers["id"] for message in reader.read(1)] == ["1"]
        assert warned(caplog) == 0
        one = Queue("one", Exchange("nodes"), routing_key="one", exclusive=True)
        reader = Reader(worker, one, no_ack=True)
        for _ in range(2):
            send(producer, "nodes", "one", task="add", id="2")
            send(producer, "nodes", "one")
        assert len(reader.read(4)) == 4
        assert warned(caplog) == 1  # for the task, since nobody can know


def test_what_is_no_task_and_no_queue_gets_is_told_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    with connect(place) as producer:
        Exchange("news", "fanout")(producer.channel()).declare()
        for _ in range(2):
            send(producer, "nowhere", "k")
            send(producer, "news", "k", task="add", id="1")
        assert warned(caplog) == 2
        Producer(producer.channel()).publish("body", exchange="nowhere", routing_key="other", delivery_mode=1)
        assert warned(caplog) == 2


def test_commands_of_the_remote_control_need_no_queue(caplog: pytest.LogCaptureFixture) -> None:
    with placed("memory") as place, connect(place) as connection, connect(place, 1) as other:
        node = Mailbox("celery", type="fanout").Node("w1", channel=connection.channel())
        node.listen(callback=lambda *_: None)
        box = Mailbox("celery", type="fanout")(other)
        box.multi_call("ping", timeout=0.1)
        box.cast(["w1"], "revoke", {"task_id": "x"})
    assert warned(caplog) == 0


def test_of_what_is_told_not_everything_is_kept_in_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchanges, "UNROUTED", 2)
    with placed("memory") as place, connect(place) as producer:
        for n in range(5):
            send(producer, "nowhere", str(n))
        assert len(producer.transport.bridge.exchanges._unrouted) <= 2


def test_an_exchange_that_is_deleted_is_listened_to_by_nobody(place: Place) -> None:
    with connect(place) as worker, connect(place, 1) as producer:
        box = Broadcast("everybody")
        reader = Reader(worker, box, no_ack=True)
        send(producer, box.exchange.name, "", task="add", id="1")
        box.exchange(reader.channel).delete()
        with pytest.raises(NotFound):
            while True:  # until the producer has heard of it
                send(producer, box.exchange.name, "", task="add", id="2")


def test_what_is_to_be_kept_goes_to_a_queue_that_was_declared_just_now(place: Place) -> None:
    queue = Queue("plain")
    with connect(place) as reader, connect(place, 1) as producer:
        send(producer, "", "plain")  # there is no such queue yet
        queue(reader.channel()).declare()
        send(producer, "", "plain")
        assert len(Reader(reader, queue).read(1)) == 1
