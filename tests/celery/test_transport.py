"""The transport as kombu uses it, without a server: what the threads of Celery see of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import InvalidTaskError
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import ChannelError, ContentDisallowed, OperationalError

from brokerkit.celery import _collect, transport
from brokerkit.celery._exchanges import Exchanges
from brokerkit.celery._names import service_queue
from brokerkit.errors import AuthenticationError, BrokerUnavailable, Closed, ConfigError, TooLarge

from .reader import WAIT, Reader, connection, publish, queue, url

__all__ = ["connection", "queue", "url"]


def on_loop(channel: Any, function: Callable[[], Any]) -> Any:
    """Return what *function* returns on the event loop."""

    async def main() -> Any:
        return function()

    return channel.bridge.call(main)


# ------------------------------------------------------------------ in and out


def test_what_is_published_comes_to_the_consumer(connection: Any, queue: Queue) -> None:
    publish(connection, queue, {"a": [1, None, "é"]})
    [message] = Reader(connection, queue).read(1)
    assert message.payload == {"a": [1, None, "é"]}
    assert message.delivery_info["routing_key"] == "work"
    message.ack()


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        2**64,
        -(2**63) - 1,
        [1, {"a": 10**30}],
        float("inf"),
        "\ud800",
        {"é": ["\u2028", 1.5, True, None]},
        "1234567890123456789012",
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        Decimal("1.10"),
        UUID(int=7),
        b"\xff\x00",
    ],
    ids=repr,
)
def test_json_is_read_as_kombu_reads_it(connection: Any, queue: Queue, value: object) -> None:
    publish(connection, queue, {"value": value})
    [message] = Reader(connection, queue).read(1)
    assert message.payload == {"value": value}
    assert type(message.payload["value"]) is type(value)
    message.ack()


def test_what_a_consumer_does_not_accept_is_not_read(connection: Any, queue: Queue) -> None:
    publish(connection, queue, {"a": 1})
    reader = Reader(connection, queue)
    [message] = reader.read(1)
    message.accept = {"application/x-other"}
    with pytest.raises(ContentDisallowed):
        message.decode()


def test_one_drain_hands_out_all_that_is_there(connection: Any, queue: Queue) -> None:
    publish(connection, queue, *range(5))
    reader = Reader(connection, queue)
    connection.drain_events(timeout=WAIT)
    assert len(reader.messages) == 5


def test_a_transient_queue_that_is_declared_again_on_its_connection_is_bound_again(connection: Any) -> None:
    commands = Queue("commands", Exchange("commands", "fanout"), durable=False, auto_delete=True, expires=10)
    first = Reader(connection, commands, no_ack=True)
    publish(connection, commands, 1)
    first.read(1)
    first.consumer.cancel()
    first.channel.close()
    second = Reader(connection, commands, no_ack=True)
    publish(connection, commands, 2)
    assert [message.payload for message in second.read(1)] == [2]


@pytest.mark.parametrize("no_ack", [True, False])
def test_an_event_that_is_none_does_not_end_a_worker(
    connection: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_ack: bool
) -> None:
    """Each worker hears the others' events, so one that is wrong would end them all."""
    events = Queue("celeryev.1", Exchange("celeryev", "topic"), routing_key="#", auto_delete=True, durable=False)
    seen: list[str] = []

    def take(body: Any, message: Any) -> None:
        seen.append(body["hostname"])
        if not no_ack:
            message.ack()

    reader = Reader(connection, events, no_ack=no_ack)
    reader.consumer.on_message, reader.consumer.callbacks = None, [take]
    publish(connection, events, {"no": "hostname"})
    monkeypatch.delitem(sys.modules, "celery.worker.consumer.consumer", raising=False)  # other tests may have worked
    with pytest.raises(KeyError):  # a program of its own, which has to know
        connection.drain_events(timeout=WAIT)
    monkeypatch.setitem(sys.modules, "celery.worker.consumer.consumer", sys)
    publish(connection, events, {"no": "hostname"}, {"hostname": "w1"})
    while not seen:
        connection.drain_events(timeout=WAIT)
    assert seen == ["w1"]
    assert sum("which its reader cannot take" in record.getMessage() for record in caplog.records) == 1
    assert len(reader.channel.qos.items) == (0 if no_ack else 1)  # that of the program


def test_one_drain_hands_out_one_answer(connection: Any) -> None:
    replies = Queue("replies", Exchange("replies"), routing_key="replies", exclusive=True, auto_delete=True)
    reader = Reader(connection, replies)
    publish(connection, replies, 1, 2)
    connection.drain_events(timeout=WAIT)
    assert len(reader.messages) == 1  # who asks two workers drains twice, and would wait for a third answer
    connection.drain_events(timeout=WAIT)
    assert len(reader.messages) == 2


def test_what_is_consumed_without_acknowledgement_is_gone_when_it_is_handed_out(connection: Any, queue: Queue) -> None:
    publish(connection, queue, *range(3))
    reader = Reader(connection, queue, no_ack=True)
    reader.read(3)
    reader.channel.close()
    publish(connection, queue, "by hand")
    with connection.channel() as channel:
        assert channel.basic_get("work", no_ack=True).payload == "by hand"
    with connection.channel() as channel:
        assert channel.basic_get("work") is None


@pytest.mark.parametrize("body", [{}, [], "text", [[], {}], [1, {}, {}], [[], [], {}], [[], {}, 1], 7], ids=repr)
def test_a_task_that_is_none_is_none_to_celery(connection: Any, queue: Queue, body: object) -> None:
    queue(connection.default_channel).declare()
    Producer(connection).publish(body, routing_key="work", serializer="json", headers={"task": "t", "id": "1"})
    [message] = Reader(connection, queue).read(1)
    with pytest.raises(InvalidTaskError):
        message.decode()


def test_a_task_that_cannot_be_read_is_none_to_celery(connection: Any, queue: Queue) -> None:
    queue(connection.default_channel).declare()
    headers = {"task": "t", "id": "1"}
    Producer(connection).publish(
        "[[", routing_key="work", content_type="application/json", content_encoding="utf-8", headers=headers
    )
    [message] = Reader(connection, queue).read(1)
    with pytest.raises(InvalidTaskError):
        message.decode()


def test_a_task_is_a_task(connection: Any, queue: Queue) -> None:
    queue(connection.default_channel).declare()
    bodies = [[[1], {"a": 2}, {"chain": None}], [[], {}, None], {"args": [], "task": "t"}]
    for body in bodies:
        Producer(connection).publish(body, routing_key="work", headers={"task": "t", "id": "1"})
    assert [message.payload for message in Reader(connection, queue).read(3)] == bodies


def test_draining_ends_when_nothing_comes(connection: Any, queue: Queue) -> None:
    reader = Reader(connection, queue)
    assert reader.nothing(0.05)
    assert reader.nothing(0)


def test_draining_a_closed_connection_is_an_error_of_the_connection(url: str, queue: Queue) -> None:
    connection = Connection(url)
    connection.connect()
    carrier = connection.transport
    connection.close()
    with pytest.raises(carrier.connection_errors):
        carrier.drain_events(carrier, timeout=1)


def test_many_threads_publish_on_one_channel(connection: Any, queue: Queue) -> None:
    channel = connection.default_channel
    queue(channel).declare()

    def one(number: int) -> None:
        Producer(channel).publish(number, exchange=queue.exchange, routing_key="work")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(100)))
    read = Reader(connection, queue).read(100)
    assert sorted(message.payload for message in read) == list(range(100))


def test_tags_differ_although_the_message_is_the_same(connection: Any, queue: Queue) -> None:
    publish(connection, queue, "again")
    reader = Reader(connection, queue)
    [first] = reader.read(1)
    first.requeue()
    second = reader.read(2)[1]
    assert first.delivery_tag != second.delivery_tag
    assert not first.delivery_info.get("redelivered")
    assert second.delivery_info["redelivered"]


def test_a_message_is_fetched_by_hand(connection: Any, queue: Queue) -> None:
    publish(connection, queue, "one")
    channel = connection.default_channel
    message = channel.basic_get("work")
    assert message.payload == "one"
    assert channel.basic_get("work") is None
    message.ack()
    assert not channel.qos.items


def test_counting_purging_deleting(connection: Any, queue: Queue) -> None:
    channel = connection.default_channel
    assert queue(channel).declare() == "work"
    publish(connection, queue, 1, 2, 3)
    assert channel.queue_declare("work", passive=True).message_count == 3
    assert queue(channel).purge() == 3
    assert channel.queue_declare("work", passive=True).message_count == 0
    queue(channel).delete()
    with pytest.raises(ChannelError, match="NOT_FOUND"):
        channel.queue_declare("work", passive=True)


def test_bindings_are_listed(connection: Any, queue: Queue) -> None:
    queue(connection.default_channel).declare()
    assert connection.default_channel.get_table("work") == [("work", None, "work")]
    assert connection.manager.get_bindings() == [{"destination": "work", "source": "work", "routing_key": "work"}]


def test_what_is_too_large_is_refused_by_name(connection: Any, queue: Queue) -> None:
    with pytest.raises(TooLarge, match=r"1048320"):
        publish(connection, queue, "x" * 2_000_000)


# ------------------------------------------------------------------ settling


def test_acknowledgements_of_one_turn_leave_together(
    connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(connection, queue, *range(50))
    reader = Reader(connection, queue)
    messages = reader.read(50)
    batches: list[int] = []
    ack = reader.channel.intake.ack

    def counted(items: Sequence[Any]) -> None:
        batches.append(len(items))
        ack(items)

    monkeypatch.setattr(reader.channel.intake, "ack", counted)
    hold, held = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait(WAIT)

    reader.channel.bridge.post(wait)
    assert held.wait(WAIT)
    for message in messages:
        message.ack()
    hold.set()
    on_loop(reader.channel, lambda: None)
    assert batches == [50]


def test_any_thread_may_acknowledge(connection: Any, queue: Queue) -> None:
    publish(connection, queue, *range(20))
    reader = Reader(connection, queue)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda message: message.ack(), reader.read(20)))
    reader.channel.close()
    assert connection.default_channel._size("work") == 0
    assert connection.default_channel.basic_get("work") is None


def test_no_more_than_the_prefetch_count_are_unsettled(connection: Any, queue: Queue) -> None:
    publish(connection, queue, *range(5))
    reader = Reader(connection, queue, prefetch=2)
    first, _ = reader.read(2)
    assert reader.nothing()
    first.ack()
    reader.read(3)
    reader.consumer.qos(prefetch_count=4)
    reader.read(5)


def test_what_is_rejected_goes_to_the_dead_letters(url: str, connection: Any, queue: Queue) -> None:
    publish(connection, queue, "bad")
    reader = Reader(connection, queue)
    reader.read(1)[0].reject()
    reader.channel.close()

    async def letters() -> list[str]:
        broker = connection.default_channel.bridge.broker
        return [letter.value.body async for letter in broker.browse(service_queue("work").dead_letters)]

    assert connection.default_channel.bridge.call(letters) == ["bad"]


def test_closing_gives_back_what_is_unsettled(connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "celery.worker.state", raising=False)  # other tests may have worked
    publish(connection, queue, "left")
    reader = Reader(connection, queue)
    reader.read(1)
    reader.channel.close()
    [again] = Reader(connection, queue).read(1)
    assert again.delivery_info["redelivered"]


def test_cancelling_gives_back_what_no_consumer_saw(
    connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SLICE", 0.0)
    publish(connection, queue, *range(5))
    reader = Reader(connection, queue, prefetch=5)
    [seen] = reader.read(1)
    reader.consumer.cancel()
    others = Reader(connection, queue).read(4)
    assert sorted(message.payload for message in (seen, *others)) == list(range(5))
    assert not any(message.delivery_info.get("redelivered") for message in others)
    seen.ack()  # still possible
    reader.channel.close()
    for message in others:
        message.ack()
    assert connection.default_channel.basic_get("work") is None


def test_a_second_consumer_of_a_queue_takes_over(connection: Any, queue: Queue) -> None:
    reader = Reader(connection, queue)
    late: list[Any] = []
    second = Consumer(reader.channel, [queue], on_message=late.append)
    second.consume()
    second.cancel()
    publish(connection, queue, "for the first")
    assert reader.read(1)[0].payload == "for the first"
    assert not late


# ------------------------------------------------------------------ publishing


def test_a_workers_event_is_not_waited_for(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go, done = threading.Event(), threading.Event()
    channel = connection.default_channel
    sent: list[Any] = []

    async def slow(frame: Any, timeout: float) -> None:
        while not go.is_set():
            await asyncio.sleep(0.001)
        sent.append(frame)
        done.set()

    monkeypatch.setattr(channel.bridge.exchanges, "publish", slow)
    monkeypatch.setattr(channel._exchanges, "publish", slow)
    producer = Producer(channel, exchange=Exchange("celeryev", type="topic"))
    producer.publish({"type": "worker-heartbeat"}, headers={"hostname": "w1"}, delivery_mode=1, routing_key="worker.x")
    assert not sent
    go.set()
    assert done.wait(WAIT)
    assert [frame.routing_key for frame in sent] == ["worker.x"]


def test_events_that_cannot_be_published_are_dropped_with_one_warning(
    connection: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    channel = connection.default_channel

    async def fail(frame: Any, timeout: float) -> None:
        raise BrokerUnavailable("away")

    monkeypatch.setattr(channel.bridge.exchanges, "publish", fail)
    producer = Producer(channel, exchange=Exchange("celeryev", type="topic"))
    for _ in range(5):
        producer.publish({}, headers={"hostname": "w1"}, delivery_mode=1, routing_key="worker.x")
    while on_loop(channel, lambda: len(channel.bridge._trails) or channel.bridge._lost < 5):
        pass
    assert caplog.text.count("events of Celery are dropped") == 1


def test_frames_are_collected_where_that_is_asked_for(connection: Any, queue: Queue) -> None:
    channel = connection.default_channel
    queue(channel).declare()
    frames: list[_collect.Frame] = []
    token = _collect.frames.set(frames)
    try:
        Producer(channel).publish("later", routing_key="work")
    finally:
        _collect.frames.reset(token)
    assert channel._size("work") == 0
    [frame] = frames
    channel.bridge.call(frame.function, *frame.args)
    assert channel.basic_get("work", no_ack=True).payload == "later"


def test_kombu_tries_again_what_may_work_then(connection: Any, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Exchanges.publish
    calls: list[object] = []

    async def flaky(self: Any, frame: Any, timeout: float = 30) -> None:
        calls.append(frame)
        if len(calls) < 3:
            raise BrokerUnavailable("not now")
        await real(self, frame, timeout)

    monkeypatch.setattr(Exchanges, "publish", flaky)
    retry = {"max_retries": 5, "interval_start": 0, "interval_step": 0}
    Producer(connection).publish("x", routing_key="work", declare=[queue], retry=True, retry_policy=retry)
    assert len(calls) == 3

    async def never(self: Any, frame: Any, timeout: float = 30) -> None:
        raise BrokerUnavailable("never")

    monkeypatch.setattr(Exchanges, "publish", never)
    with pytest.raises(OperationalError, match="never"):
        Producer(connection).publish("x", routing_key="work", retry=True, retry_policy={**retry, "max_retries": 1})


def test_a_wrong_option_or_password_is_no_reason_to_connect_again(url: str) -> None:
    errors = (*transport.Transport.connection_errors, *transport.Transport.channel_errors)
    for kind in (ConfigError, AuthenticationError, TooLarge):
        assert not issubclass(kind, errors)
    with pytest.raises(ConfigError, match="no_such_option"):
        Connection(f"{url}?no_such_option=1").connect()


def test_a_worker_that_only_publishes_reads_nothing(connection: Any, queue: Queue) -> None:
    publish(connection, queue, 1)
    broker = connection.default_channel.bridge.broker
    assert not [intake for intake in broker._intakes if "exchange" in repr(intake)]


# ------------------------------------------------------------------ life


def test_the_password_is_never_shown() -> None:
    connection = Connection("brokerkit+redis://user:secret@localhost:1/0")
    assert "secret" not in connection.as_uri()
    assert "secret" not in repr(connection)


def test_a_closed_channel_is_closed(connection: Any, queue: Queue) -> None:
    channel = connection.channel()
    channel.close()
    channel.close()
    with pytest.raises((Closed, AttributeError)):
        channel.queue_declare("late")


def test_channels_have_numbers_of_their_own(connection: Any) -> None:
    channels = [connection.channel() for _ in range(20)]
    assert len({channel.channel_id for channel in channels}) == 20
    for channel in channels:
        channel.close()
    assert not [channel for channel in connection.transport.channels if channel in channels]
