"""Exchanges, bindings and priorities."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import pytest

from brokerkit.errors import NotFound

from .workers import PATIENCE, ROOT, Crew

feature = pytest.mark.feature
kombu: Any = import_module("kombu")


@contextmanager
def consumed(crew: Crew, node: str, queue: str, **options: Any) -> Iterator[None]:
    """Have a worker consume *queue* while the block runs."""
    wait = {"destination": [node], "reply": True, "timeout": 10 * PATIENCE, "limit": 1}
    (told,) = crew.app.control.add_consumer(queue, **wait, **options)
    assert "ok" in told[node], told
    # The worker answers before it declares and binds the queue.
    asked = crew.app.control.inspect(destination=[node], timeout=10 * PATIENCE, limit=1)
    crew.until(lambda: queue in str(asked.active_queues()), 15, f"{queue} is not consumed")
    try:
        yield
    finally:
        (told,) = crew.app.control.cancel_consumer(queue, **wait)
        assert "ok" in told[node], told


def received(channel: Any, queues: Sequence[Any], count: int) -> list[Any]:
    """Return what comes out of *queues* until there are *count* messages."""
    got: list[Any] = []

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    with kombu.Consumer(channel, queues=queues, callbacks=[take], accept=["json"]):
        for _ in range(int(100 * PATIENCE)):
            with suppress(TimeoutError):
                channel.connection.client.drain_events(timeout=0.1)
            if len(got) >= count:
                break
    return got


@feature("routing")
def test_a_topic_exchange_gives_tasks_to_the_queues_whose_patterns_match(crew: Crew) -> None:
    topic = {"exchange": "weather", "exchange_type": "topic"}
    with (
        consumed(crew, "one@test", "north", routing_key="north.#", **topic),
        consumed(crew, "two@test", "rain", routing_key="*.rain", **topic),
    ):
        exchange = kombu.Exchange("weather", type="topic")
        only = crew.send("add", 1, 1, exchange=exchange, routing_key="north.snow.deep")
        assert only.get(timeout=30) == 2
        both = crew.send("add", 1, 2, exchange=exchange, routing_key="north.rain")
        crew.ended(both.id, count=2, timeout=20)
        with pytest.raises(NotFound, match="exchange 'weather' with the routing key 'south'"):
            crew.send("add", 1, 3, exchange=exchange, routing_key="south")
        assert crew.send("add", 1, 1).get(timeout=30) == 2
    assert [entry.by for entry in crew.of(only.id, "began")] == ["one@test"]
    assert {entry.by for entry in crew.of(both.id, "began")} == {"one@test", "two@test"}
    assert crew.runs([both.id]) == {both.id: 2}


@feature("routing")
def test_a_fanout_exchange_gives_each_queue_a_copy(crew: Crew) -> None:
    fanout = {"exchange": "everywhere", "exchange_type": "fanout", "routing_key": ""}
    with consumed(crew, "one@test", "here", **fanout), consumed(crew, "two@test", "there", **fanout):
        sent = crew.send("add", 1, 2, exchange=kombu.Exchange("everywhere", type="fanout"), exchange_type="fanout")
        crew.ended(sent.id, count=2, timeout=20)
    assert {entry.by for entry in crew.of(sent.id, "began")} == {"one@test", "two@test"}


@feature("routing")
def test_a_producer_elsewhere_knows_what_was_bound(crew: Crew) -> None:
    program = """
from tests.celery.apps.main import app
from kombu import Exchange
print(app.send_task("add", (20, 3), exchange=Exchange("distance", type="direct"), routing_key="far").id)
"""
    direct = {"exchange": "distance", "exchange_type": "direct", "routing_key": "far"}
    with consumed(crew, "three@test", "away", **direct):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=crew._environment({}, {}),
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (ended,) = crew.ended(done.stdout.strip(), timeout=20)
    assert (ended.by, ended.state) == ("three@test", "SUCCESS")


@feature("routing")
def test_what_is_published_after_a_binding_is_there_when_somebody_consumes(crew: Crew) -> None:
    exchange = kombu.Exchange("letters", type="direct")
    queue = kombu.Queue("box", exchange, routing_key="mine")
    with crew.app.connection_for_write() as connection:
        channel = connection.default_channel
        queue(channel).declare()
        producer = kombu.Producer(channel, exchange=exchange, serializer="json")
        for number in range(3):
            producer.publish({"number": number}, routing_key="mine")
        producer.publish({"number": 9}, routing_key="theirs")
        got = received(channel, [queue], 3)
        assert sorted(each["number"] for each in got) == [0, 1, 2]
        queue(channel).delete()


@feature("routing")
def test_no_message_of_a_fanout_is_missed_after_the_queue_was_declared(crew: Crew) -> None:
    exchange = kombu.Exchange("news", type="fanout")
    with crew.app.connection_for_read() as connection, crew.app.connection_for_write() as other:
        channel = connection.channel()
        queue = kombu.Queue("reader", exchange, auto_delete=True, expires=60)
        queue(channel).declare()
        producer = kombu.Producer(other.default_channel, exchange=exchange, serializer="json")
        for number in range(10):
            producer.publish({"number": number})
        assert [each["number"] for each in received(channel, [queue], 10)] == list(range(10))


@feature("ttl")
def test_what_is_no_task_expires(crew: Crew) -> None:
    with crew.app.connection_for_write() as connection:
        channel = connection.default_channel
        queue = kombu.Queue("short", kombu.Exchange("short"), routing_key="short")
        queue(channel).declare()
        producer = kombu.Producer(channel, exchange=queue.exchange, routing_key="short", serializer="json")
        producer.publish({"number": 1}, expiration=0.3)
        producer.publish({"number": 2}, expiration=60)
        import_module("time").sleep(0.5)
        assert [each["number"] for each in received(channel, [queue], 1)] == [2]
        queue(channel).delete()
