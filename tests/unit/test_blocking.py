"""A broker for threads: the same calls, waited for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

import brokerkit
from brokerkit import (
    BrokerError,
    BrokerUnavailable,
    Closed,
    ConfigError,
    EncodeError,
    Message,
    NotFound,
    Queue,
    Receipt,
    RequestTimeout,
    Service,
    Topic,
    blocking,
)
from brokerkit._thread import result


@dataclass
class Order:
    id: str
    total: float


ORDERS = Topic("orders", Order)
EMAILS = Queue("emails", Order, priorities=2)
QUOTES = Queue("quotes", Order, reply=float)
_numbers = count()


@pytest.fixture
def url() -> str:
    return f"memory://blocking-{next(_numbers)}"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "brokerkit blocking"] == []


def stored(url: str, address: Topic[Any] | Queue[Any, Any]) -> list[Any]:
    """Return what is stored on the server of *url*, looked at from an event loop of its own."""

    async def main() -> list[Any]:
        async with brokerkit.connect(url) as broker:
            return [message async for message in broker.browse(address, limit=10_000)]

    return asyncio.run(main())


async def received(url: str) -> list[str]:
    """Return the ids of what two receives hand out, in order."""
    async with brokerkit.connect(url) as broker, broker.subscribe(EMAILS) as messages:
        return [message.value.id for _ in range(2) for message in await messages.receive(timeout=10)]


def driver(broker: blocking.Broker) -> Any:
    return broker._broker._driver


def in_loop(broker: blocking.Broker, function: Callable[..., Any]) -> Any:
    """Call *function* in the broker's event loop."""
    assert broker._portal is not None
    return result(broker._portal.start_task_soon(function))


# ------------------------------------------------------------------ publishing


def test_publish_returns_when_the_message_is_stored(url: str) -> None:
    with blocking.connect(url) as broker:
        receipt = broker.publish(ORDERS, Order("o1", 1.0), key="k", id="an-id", headers={"a": "b"}, timeout=3)
    assert receipt.id == "an-id"
    [message] = stored(url, ORDERS)
    assert (message.value, message.key, message.id, message.headers) == (Order("o1", 1.0), "k", "an-id", {"a": "b"})


def test_options_of_queues_are_passed_on(url: str) -> None:
    with blocking.connect(url) as broker:
        broker.publish(EMAILS, Order("low", 1.0))
        broker.publish(EMAILS, Order("high", 1.0), priority=1, ttl=60)
        broker.publish(EMAILS, Order("later", 1.0), delay=3600)
    assert asyncio.run(received(url)) == ["high", "low"]
    assert [message.value.id for message in stored(url, EMAILS)][-1] == "later"


def test_publish_many_gives_one_result_each(url: str) -> None:
    wrong: Any = "wrong"
    with blocking.connect(url) as broker:
        results: list[Receipt | BrokerError] = broker.publish_many(
            ORDERS,
            [ORDERS.outgoing(Order("a", 1.0), key="k"), ORDERS.outgoing(wrong), ORDERS.outgoing(Order("b", 1.0))],
        )
    assert [type(result) for result in results] == [Receipt, EncodeError, Receipt]
    assert {message.value.id for message in stored(url, ORDERS)} == {"a", "b"}


def test_what_publish_many_takes_is_read_in_the_calling_thread(url: str) -> None:
    threads: list[threading.Thread] = []

    def rows() -> Iterator[Order]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield Order(str(number), 1.0)

    with blocking.connect(url) as broker:
        assert len(broker.publish_many(ORDERS, rows())) == 3
    assert set(threads) == {threading.current_thread()}


def test_many_threads_share_one_broker(url: str) -> None:
    def work(broker: blocking.Broker, worker: int) -> list[str]:
        return [broker.publish(ORDERS, Order(f"{worker}-{n}", 1.0), key=str(worker)).id for n in range(25)]

    with blocking.connect(url) as broker, ThreadPoolExecutor(16) as pool:
        ids = [id for made in pool.map(work, [broker] * 16, range(16)) for id in made]
    messages = stored(url, ORDERS)
    assert sorted(message.id for message in messages) == sorted(ids)
    for worker in range(16):
        mine = [message.value.id for message in messages if message.key == str(worker)]
        assert mine == [f"{worker}-{n}" for n in range(25)]


def test_two_brokers_may_use_one_server(url: str) -> None:
    with blocking.connect(url) as one, blocking.connect(url) as other:
        one.publish(ORDERS, Order("a", 1.0), key="k")
        other.publish(ORDERS, Order("b", 1.0), key="k")
    assert [message.value.id for message in stored(url, ORDERS)] == ["a", "b"]


def test_request_returns_the_answer(url: str) -> None:
    service = Service("quoting")

    @service.subscribe(QUOTES)
    async def quote(message: Message[Order]) -> float:
        return message.value.total * 2

    with blocking.connect(url) as broker:
        ready, done = threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with brokerkit.connect(url) as server, service.running(server):
                ready.set()
                await done.wait()

        assert broker._portal is not None
        serving = broker._portal.start_task_soon(serve)
        assert ready.wait(10)
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda n: broker.request(QUOTES, Order("a", float(n)), timeout=10), range(20))
            assert list(answers) == [n * 2 for n in range(20)]
        in_loop(broker, done.set)
        serving.result(10)


def test_errors_are_those_of_the_async_broker(url: str) -> None:
    with blocking.connect(url, declare="never") as broker, pytest.raises(NotFound):
        broker.publish(ORDERS, Order("a", 1.0))
    with blocking.connect(url) as broker:
        with pytest.raises(EncodeError):
            broker.publish(ORDERS, "wrong")  # type: ignore[misc]
        with pytest.raises(ConfigError):
            broker.publish(ORDERS, Order("a", 1.0), delay=3)  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            broker.publish(ORDERS, Order("a", 1.0), dely=3)  # type: ignore[call-overload]
        with pytest.raises(RequestTimeout):
            broker.request(QUOTES, Order("a", 1.0), timeout=0.01)
        broker.publish(ORDERS, Order("a", 1.0))  # none of them broke anything


def test_events_are_heard(url: str) -> None:
    heard: list[object] = []
    with blocking.connect(url, on_event=heard.append) as broker:
        in_loop(broker, lambda: broker._broker._emit(brokerkit.Event(address="a")))
    assert heard == [brokerkit.Event(address="a")]


# ------------------------------------------------------------------ life


def test_wrong_options_are_refused_before_anything_begins() -> None:
    with pytest.raises(ConfigError):
        blocking.connect("nonsense://")
    with pytest.raises(ConfigError):
        blocking.connect("memory://", declare="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        blocking.connect("memory://", options={"max_message": 1})


def test_a_broker_is_used_between_opening_and_closing(url: str) -> None:
    broker = blocking.connect(url)
    with pytest.raises(Closed, match="not open yet"):
        broker.publish(ORDERS, Order("a", 1.0))
    with broker:
        broker.publish(ORDERS, Order("a", 1.0))
        with pytest.raises(Closed, match="cannot be opened again"):
            broker.open()
    with pytest.raises(Closed, match="is closed"):
        broker.publish(ORDERS, Order("a", 1.0))
    with pytest.raises(Closed, match="cannot be opened again"):
        broker.open()
    assert "closed" in repr(broker)


def test_closing_again_does_nothing(url: str) -> None:
    blocking.connect(url).close()
    broker = blocking.connect(url).open()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(broker.close) for _ in range(8)]:
            done.result()
    broker.close()


def test_opening_may_be_tried_again_after_it_failed(url: str) -> None:
    tries: list[brokerkit.Broker] = []

    def make() -> brokerkit.Broker:
        broker = brokerkit.connect(url)
        tries.append(broker)
        if len(tries) == 1:

            async def fail() -> None:
                raise BrokerUnavailable("no answer")

            broker._driver = Failing(fail)  # type: ignore[assignment]
        return broker

    broker = blocking.Broker(make)
    with pytest.raises(BrokerUnavailable):
        broker.open()
    with broker:
        broker.publish(ORDERS, Order("a", 1.0))


class Failing:
    """A driver that cannot connect."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    async def __aenter__(self) -> None:
        await self.fail()

    async def __aexit__(self, *_: object) -> None:
        """Never reached."""


class Signalling:
    """A codec that tells when a call is under way; it runs in the loop's thread."""

    content_type = "text/x-signal"

    def __init__(self) -> None:
        self.reached: Callable[[], object] = lambda: None

    def encode(self, value: str, /) -> bytes:
        self.reached()
        return value.encode()

    def decode(self, body: bytes, headers: Mapping[str, str], /) -> str:
        return body.decode()


def test_closing_waits_for_the_calls_of_other_threads(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    def noticed(calls: Collection[Future[Any]]) -> object:
        assert len(calls) == 1
        waiting.set()
        return wait(calls)

    monkeypatch.setattr(blocking, "wait", noticed)
    codec = Signalling()
    topic = Topic("signals", str, codec=codec)
    broker = blocking.connect(url).open()
    broker.publish(topic, "first")
    reached = threading.Event()
    codec.reached = reached.set
    in_loop(broker, driver(broker).faults.freeze)
    portal, thaw = broker._portal, driver(broker).faults.thaw
    assert portal is not None
    with ThreadPoolExecutor(2) as pool:
        publishing = pool.submit(broker.publish, topic, "second")
        assert reached.wait(10)
        closing = pool.submit(broker.close)
        assert waiting.wait(10)
        with pytest.raises(Closed):
            broker.publish(topic, "third")
        assert not publishing.done()
        assert not closing.done()
        result(portal.start_task_soon(thaw))
        assert isinstance(publishing.result(10), Receipt)
        closing.result(10)
    assert sorted(message.value for message in stored(url, topic)) == ["first", "second"]


class Noticed(set[Any]):
    """Calls; tells when one was added."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed = threading.Event()

    def add(self, call: Any) -> None:
        super().add(call)
        self.noticed.set()


def test_a_call_that_is_interrupted_is_given_up(url: str) -> None:
    main = threading.main_thread().ident
    assert main is not None
    codec = Signalling()
    topic = Topic("signals", str, codec=codec)
    reached = threading.Event()

    interrupted = threading.Event()

    def once(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        assert calls.noticed.wait(10)
        assert reached.wait(10)
        while not interrupted.wait(0.1):  # one that comes just before the main thread begins to wait does not wake it
            signal.pthread_kill(main, signal.SIGINT)

    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, once))
        broker, pool = stack.enter_context(blocking.connect(url)), stack.enter_context(ThreadPoolExecutor(1))
        broker.publish(topic, "first")
        codec.reached = reached.set
        broker._calls = calls = Noticed()
        in_loop(broker, driver(broker).faults.freeze)
        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            broker.publish(topic, "second", timeout=300)
        interrupting.result(10)
        in_loop(broker, driver(broker).faults.thaw)
    assert [message.value for message in stored(url, topic)] == ["first"]


# ------------------------------------------------------------------ where it must not be used


def test_it_is_refused_where_it_would_block_an_event_loop(url: str) -> None:
    async def main(broker: blocking.Broker) -> None:
        with pytest.raises(ConfigError, match="would block the event loop"):
            blocking.connect(url).open()
        with pytest.raises(ConfigError, match="would block the event loop"):
            broker.publish(ORDERS, Order("a", 1.0))
        with pytest.raises(ConfigError, match="would block the event loop"):
            broker.close()
        await asyncio.to_thread(broker.publish, ORDERS, Order("b", 1.0))

    with blocking.connect(url) as broker:
        asyncio.run(main(broker))
    assert [message.value.id for message in stored(url, ORDERS)] == ["b"]


FORKING = """
import os, sys
from brokerkit import ConfigError, Queue, blocking

QUEUE = Queue("q", str)
with blocking.connect("memory://parent") as broker:
    broker.publish(QUEUE, "before")
    child = os.fork()
    if child == 0:
        for attempt in (lambda: broker.publish(QUEUE, "in the child"), broker.open):
            try:
                attempt()
            except ConfigError as error:
                assert "fork" in str(error), error
            else:
                os._exit(1)
        broker.close()
        with blocking.connect("memory://child") as own:
            own.publish(QUEUE, "own")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    broker.publish(QUEUE, "after")
sys.exit(os.waitstatus_to_exitcode(status))
"""

LEAVING_OPEN = """
from brokerkit import Queue, blocking

broker = blocking.connect("memory://").open()
broker.publish(Queue("q", str), "text")
closing = broker._broker.__aexit__

async def closed(*exc):
    await closing(*exc)
    print("closed", flush=True)

broker._broker.__aexit__ = closed
"""


def program(source: str) -> subprocess.CompletedProcess[str]:
    # Newer Pythons warn of any fork beside threads: here the child only looks.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_child_process_must_connect_for_itself() -> None:
    done = program(FORKING)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_leaves_it_open_ends_and_closes_it() -> None:
    done = program(LEAVING_OPEN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
