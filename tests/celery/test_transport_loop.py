"""The transport in the loop of a worker: one descriptor, slices, and what stops it."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from celery import signals
from kombu import Connection, Consumer, Exchange, Queue

from brokerkit.celery import _channel, transport
from brokerkit.celery._feed import Feed
from brokerkit.errors import BrokerUnavailable

from .reader import WAIT, Reader, connection, publish, queue, url

__all__ = ["connection", "queue", "url"]


class Hub:
    """What a transport needs of Celery's loop."""

    def __init__(self) -> None:
        self.readers: dict[Any, tuple[Any, ...]] = {}
        self.on_tick: set[Callable[[], None]] = set()

    def add_reader(self, descriptor: Any, *callback: Any) -> None:
        self.readers[descriptor] = callback

    def remove_reader(self, descriptor: Any) -> None:
        del self.readers[descriptor]

    def turn(self, seconds: float = WAIT) -> bool:
        """Wait for a descriptor and call back, once; tell whether one was ready."""
        for tick in set(self.on_tick):
            tick()
        ready, _, _ = select.select(list(self.readers), [], [], seconds)
        for descriptor in ready:
            function, *args = self.readers[descriptor]
            function(*args)
        return bool(ready)


@pytest.fixture
def hub(connection: Any) -> Hub:
    hub = Hub()
    connection.connect()
    connection.transport.register_with_event_loop(connection.connection, hub)
    return hub


def test_one_descriptor_announces_everything(connection: Any, queue: Queue, hub: Hub) -> None:
    other = Queue("other", Exchange("other"), routing_key="other")
    reader = Reader(connection, queue, other)
    [descriptor] = hub.readers
    for number in range(20):
        publish(connection, (queue, other)[number % 2], number)
        while len(reader.messages) <= number:
            hub.turn()
    assert list(hub.readers) == [descriptor]
    assert not hub.on_tick  # nothing is done on every turn


def test_closing_takes_the_descriptor_away(connection: Any, hub: Hub) -> None:
    connection.close()
    assert not hub.readers


def test_messages_are_handed_out_in_slices(
    connection: Any, queue: Queue, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SLICE", 0.0)
    publish(connection, queue, 1, 2, 3)
    reader = Reader(connection, queue)
    for count in (1, 2, 3):
        hub.turn()
        assert len(reader.messages) <= count
    while len(reader.messages) < 3:
        hub.turn()


def test_a_worker_that_stops_wakes_and_gets_no_more(
    connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(should_stop=None, should_terminate=None, reserved_requests=(), active_requests=())
    monkeypatch.setitem(sys.modules, "celery.worker.state", state)
    monkeypatch.setattr(transport, "SLICE", 1000.0)
    hub = Hub()
    connection.connect()
    connection.transport.register_with_event_loop(connection.connection, hub)
    signals.worker_shutting_down.send(sender="w1")
    assert hub.turn(WAIT)
    assert not hub.turn(0)
    publish(connection, queue, *range(10))
    reader = Reader(connection, queue)

    def stop(message: Any) -> None:
        reader.messages.append(message)
        state.should_stop = 0

    reader.consumer.on_message = stop
    hub.turn()
    assert len(reader.messages) == 1


def test_a_failure_of_the_subscription_comes_out_of_the_loop(connection: Any, queue: Queue, hub: Hub) -> None:
    Reader(connection, queue)
    connection.transport.fail(BrokerUnavailable("gone for good"))
    with pytest.raises(BrokerUnavailable, match="gone for good"):
        hub.turn()


def test_only_what_can_begin_is_fetched_where_celery_says_so(connection: Any, queue: Queue, hub: Hub) -> None:
    publish(connection, queue, *range(6))
    reader = Reader.__new__(Reader)
    reader.connection, reader.channel, reader.messages = connection, connection.channel(), []
    running: list[Any] = []

    def can_consume(self: Any) -> bool:
        return len(running) < 2

    reader.channel.qos.can_consume = MethodType(can_consume, reader.channel.qos)

    def begin(message: Any) -> None:
        reader.messages.append(message)
        running.append(message)
        message.ack()  # early

    reader.consumer = Consumer(reader.channel, [queue], on_message=begin, prefetch_count=100)
    reader.consumer.consume()
    for done in range(5):
        while len(reader.messages) < min(done + 2, 6):
            hub.turn()
        for _ in range(5):
            hub.turn(0.02)
        assert len(reader.messages) == min(done + 2, 6)
        assert connection.default_channel._size("work") == 6 - len(reader.messages)
        running.pop()


def test_workers_find_each_other_over_every_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Step:
        compatible_transports = {"amqp"}

    class Other(Step):
        compatible_transports = {"amqp"}

    for name, step in (("mingle", Step), ("gossip", Other)):
        module = SimpleNamespace(**{name.capitalize(): step})
        monkeypatch.setitem(sys.modules, f"celery.worker.consumer.{name}", module)
    for system in ("redis", "kafka", "memory"):
        assert Connection(f"brokerkit+{system}://localhost").transport.driver_type == system
        assert system in Step.compatible_transports
        assert system in Other.compatible_transports


@pytest.mark.parametrize("problem", [None, BrokerUnavailable("no answer")], ids=["lost", "unknown"])
def test_what_waited_here_and_may_be_somebody_elses_is_handed_to_nobody_and_comes_again(
    connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch, problem: BrokerUnavailable | None
) -> None:
    def owns(feed: Feed, message: object) -> bool:
        if problem is not None:
            raise problem
        return False

    with monkeypatch.context() as stood_still:
        stood_still.setattr(_channel, "STALE", -1.0)
        stood_still.setattr(Feed, "owns", owns)
        publish(connection, queue, "a")
        reader = Reader(connection, queue)
        assert reader.nothing()
    [message] = reader.read(1)
    assert message.payload == "a"
    assert not message.delivery_info.get("redelivered")
    message.ack()


def test_what_waited_for_long_and_is_ours_is_handed_over(
    connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "STALE", -1.0)
    publish(connection, queue, "a")
    [message] = Reader(connection, queue).read(1)
    message.ack()
