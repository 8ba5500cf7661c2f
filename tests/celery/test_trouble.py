"""Brokers that are not there, passwords that are wrong, and input that is bad."""

from __future__ import annotations

import threading
import time
from importlib import import_module
from typing import Any
from urllib.parse import quote

import pytest

from brokerkit.celery import _channel

from ..servers import RedisServer
from ..servers.kafka import KafkaCluster, shared_kafka
from .checker import Harm, check, ours
from .conftest import Hire
from .journal import now
from .systems import LEASE, System
from .workers import PATIENCE

feature = pytest.mark.feature
kombu: Any = import_module("kombu")


class Broker:
    """A server of the test's own, which it may end and start."""

    def __init__(self, system: System) -> None:
        self.redis: RedisServer | None = None
        self.kafka: KafkaCluster | None = None
        if system.name == "redis":
            self.redis = RedisServer(appendonly=True, appendfsync="always")
        else:
            self.kafka = KafkaCluster(listeners=("PLAIN", "SASL"))

    def start(self) -> None:
        if self.redis is not None:
            self.redis.start()
        elif self.kafka is not None:
            if self.kafka._folder is None:
                self.kafka.start()
            else:
                self.kafka.revive()

    def kill(self) -> None:
        if self.redis is not None:
            self.redis.kill()
        elif self.kafka is not None:
            self.kafka.kill()

    def stop(self) -> None:
        if self.redis is not None:
            self.redis.stop()
        elif self.kafka is not None:
            self.kafka.stop()

    @property
    def url(self) -> str:
        if self.redis is not None:
            return f"brokerkit+{self.redis.url()}"
        assert self.kafka is not None
        return self.kafka.endpoints.url()

    def wrong(self, password: str) -> str:
        """Return the URL with a password that is not right."""
        if self.redis is not None:
            return f"brokerkit+{self.redis.url(password=password)}"
        assert self.kafka is not None
        return self.kafka.endpoints.url("SASL", password=password)


@pytest.fixture
def broker(system: System) -> Any:
    """Return a broker of this test's own, started."""
    own = Broker(system)
    try:
        own.start()
        yield own
    finally:
        own.stop()


@feature("broker_restart")
def test_workers_and_producers_go_on_when_the_broker_was_killed_under_load(hire: Hire, broker: Broker) -> None:
    crew = hire(url=broker.url, options={"lease": LEASE})
    crew.start("one", "two")
    stored: dict[str, bool] = {}
    enough = threading.Event()

    def produce() -> None:
        while not enough.is_set():
            id = kombu.uuid()
            stored[id] = False
            try:
                crew.send("late_nap", 0.01, task_id=id, ignore_result=True)
            except Exception:
                time.sleep(0.1)  # it said so: nobody counts on it
            else:
                stored[id] = True

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        crew.until(lambda: sum(entry.what == "ended" for entry in crew.journal.entries) >= 30, 20, "no tasks run")
        begin = now()
        broker.kill()
        time.sleep(1.0)
        broker.start()
        harm = Harm(what="broker", begin=begin, end=now() + LEASE)
        known = sum(stored.values())
        crew.until(lambda: sum(stored.values()) >= known + 30, 40, "publishing does not go on")
    finally:
        enough.set()
        producer.join()
    ids = [id for id, sure in stored.items() if sure]
    crew.ended(*ids, timeout=40)
    assert all(worker.running for worker in crew.workers)
    crew.journal.more()
    verdict = check(ours(crew.journal.entries, stored), stored, [harm], unstored=2.0)
    assert not verdict.findings, crew.report(f"{verdict.summary()}: {verdict.findings[:5]}")


@feature("broker_restart")
def test_a_worker_goes_on_when_its_queue_has_vanished(hire: Hire) -> None:
    crew = hire()
    (worker,) = crew.start("one")
    running = crew.send("late_nap", 2)
    crew.began(running.id)
    with crew.app.connection_for_write() as connection:
        connection.default_channel.queue_delete("jobs")
    crew.until(lambda: "made anew" in worker.text(), 20, lambda: worker.text()[-2000:])
    assert crew.send("add", 2, 2).get(timeout=20 * PATIENCE) == 4
    crew.ended(running.id)
    assert crew.send("add", 3, 3).get(timeout=20 * PATIENCE) == 6
    assert worker.running
    assert len(crew.of(running.id, "began")) == 1


@feature("broker_absent")
def test_a_worker_waits_for_a_broker_that_is_not_there_yet(hire: Hire, broker: Broker) -> None:
    crew = hire(url=broker.url)
    broker.kill()
    (worker,) = crew.start("one", waiting=True)
    crew.until(lambda: "ERROR" in worker.text() or "Trying again" in worker.text(), 20, "it says nothing")
    assert worker.running
    broker.start()
    crew.ready(worker)
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2


@feature("broker_absent")
def test_publishing_fails_when_there_is_no_broker(hire: Hire, broker: Broker) -> None:
    crew = hire(url=broker.url)
    broker.kill()
    begin = now()
    with pytest.raises((*crew.app.connection().connection_errors, kombu.exceptions.OperationalError)):
        crew.send("add", 1, 1, retry=False, ignore_result=True)
    assert now() - begin < 30 * PATIENCE


@feature("broker_restart")
def test_publishing_is_tried_again_for_as_long_as_the_policy_says(
    hire: Hire, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "PUBLISH_TIMEOUT", 0.2)
    policy = {"max_retries": 60, "interval_start": 0.5, "interval_step": 0, "interval_max": 0.5}
    crew = hire(url=broker.url, task_publish_retry_policy=policy)
    crew.send("add", 1, 1, ignore_result=True)
    broker.kill()
    back = threading.Timer(2.0, broker.start)
    back.start()
    try:
        crew.send("add", 2, 2, ignore_result=True)
    finally:
        back.join()
    with crew.app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare("jobs").message_count >= 2


@feature("secrets")
def test_a_wrong_password_is_said_and_not_shown(hire: Hire, broker: Broker) -> None:
    password = "secret-that-is-wrong"
    crew = hire(url=broker.wrong(quote(password)), broker_connection_max_retries=2)
    with pytest.raises(Exception) as raised:
        crew.send("add", 1, 1, retry=False, ignore_result=True)
    told = "".join(str(each) for each in (raised.value, raised.value.__cause__, raised.value.__context__))
    (worker,) = crew.start("one", waiting=True)

    def says() -> bool:
        text = worker.text().lower()
        return any(word in text for word in ("authenticat", "wrongpass", "password", "credential"))

    crew.until(says, 30, lambda: worker.text()[-2000:])
    assert password not in told + worker.text()


@feature("oversize")
def test_arguments_that_are_too_large_are_refused_where_they_are_given(hire: Hire) -> None:
    crew = hire()
    crew.start("one", concurrency=1)
    with pytest.raises(Exception, match=r"(?i)large|limit|bytes") as raised:
        crew.send("size", "x" * 1_200_000, ignore_result=True)
    assert "1" in str(raised.value)
    assert crew.send("size", "x" * 500_000).get(timeout=20 * PATIENCE) == 500_000


@feature("bad_input")
def test_an_unknown_task_does_not_stop_a_worker_and_does_not_come_again(hire: Hire) -> None:
    crew = hire(options={"lease": LEASE})
    crew.start("one", concurrency=1)
    sent = crew.app.send_task("nobody.knows", (1, 2)).id
    crew.until(lambda: crew.of(sent, "unknown"), 20, "nobody has it")
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    time.sleep(LEASE + 1)
    assert len(crew.of(sent, "unknown")) == 1
    assert crew.workers[0].running


@feature("bad_input")
def test_what_is_no_task_does_not_stop_a_worker_and_does_not_come_again(hire: Hire) -> None:
    crew = hire(options={"lease": LEASE})
    (worker,) = crew.start("one", concurrency=1)
    bodies: list[tuple[Any, dict[str, Any]]] = [
        (b"\xff\xfe not json", {"content_type": "application/json", "content_encoding": "utf-8"}),
        (b"\x80\x04N.", {"content_type": "application/x-python-serialize", "content_encoding": "binary"}),
        (b"{}", {"content_type": "application/no-such-thing", "content_encoding": "no-such-code"}),
        ("", {"content_type": "", "content_encoding": ""}),
    ]
    with crew.app.connection_for_write() as connection:
        producer = connection.Producer()
        for body, how in bodies:
            producer.publish(body, routing_key="jobs", exchange="", **how)
            header = {"task": "add", "id": kombu.uuid(), "lang": "py"}
            producer.publish(body, routing_key="jobs", exchange="", headers=header, **how)
        assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
        time.sleep(LEASE + 1)
        assert connection.default_channel.queue_declare("jobs").message_count == 0
    assert worker.running
    assert crew.send("add", 2, 1).get(timeout=20 * PATIENCE) == 3
    complaints = worker.text().count("discarding")
    assert complaints <= 2 * len(bodies), worker.text()[-3000:]


@feature("bad_input")
def test_a_task_whose_body_is_something_else_does_not_end_a_worker(hire: Hire) -> None:
    crew = hire(options={"lease": LEASE})
    (worker,) = crew.start("one", concurrency=1)
    with crew.app.connection_for_write() as connection:
        producer = connection.Producer()
        for body in ('{"no": "task"}', "[]", "17", "[1, 2, 3]", "[[], {}, null]"):
            for headers in ({}, {"task": "add", "id": kombu.uuid(), "lang": "py"}):
                how = {"content_type": "application/json", "content_encoding": "utf-8", "headers": headers}
                producer.publish(body, routing_key="jobs", exchange="", **how)
    assert crew.send("add", 1, 1).get(timeout=20 * PATIENCE) == 2
    assert worker.running


def test_workers_that_have_ended_and_questions_leave_nothing_behind(hire: Hire, system: System) -> None:
    crew = hire()
    workers = crew.start("one", "two", concurrency=1)
    control = crew.app.control
    assert set(control.inspect(timeout=10 * PATIENCE, limit=2).ping()) == {"one@test", "two@test"}

    def stored() -> set[str]:
        if system.name == "kafka":
            prefix = crew.settings.config["broker_transport_options"]["prefix"]
            with shared_kafka().wire() as admin:
                return {name for name in admin.cluster(None).topics if name.startswith(prefix)}
        return {key.decode() for key in system.results.command_now("KEYS", "*")}

    before = stored()
    for _ in range(5):
        control.inspect(timeout=10 * PATIENCE, limit=2).ping()
    for worker in workers:
        worker.stop()
    crew.until(lambda: stored() <= before, 15, lambda: f"left behind: {stored() - before}")
