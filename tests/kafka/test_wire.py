"""One open connection to a broker: what is sent, what comes back, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Mapping
from typing import Any

import pytest
from kio.schema.find_coordinator.v3.request import FindCoordinatorRequest

from brokerkit.drivers.kafka._api import SPOKEN, Hello, Request
from brokerkit.drivers.kafka._errors import Unanswered
from brokerkit.drivers.kafka._wire import LARGEST, Wire
from brokerkit.errors import (
    BrokerError,
    BrokerUnavailable,
)
from tests.servers.kafka import Endpoints, Listener, shared_kafka

from .connecting import files, metadata, open_wire, read
from .liar import (
    versions,
)

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def kafka() -> Endpoints:
    """A broker that listens in every way."""
    return shared_kafka()


class Transport(asyncio.Transport):
    """Takes what is written, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = 0

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self.aborted += 1

    def is_closing(self) -> bool:
        return self.aborted > 0


def wired() -> tuple[Wire, Transport]:
    """Return a connection whose other end is the test."""
    wire, transport = Wire("h:9092"), Transport()
    wire.connection_made(transport)
    return wire, transport


def number(transport: Transport) -> int:
    """Return the number of the last request that was written, and forget what was."""
    data, transport.written = transport.written, b""
    last = 0
    while data:
        size = int.from_bytes(data[:4], "big")
        last, data = int.from_bytes(data[8:12], "big"), data[4 + size :]
    return last


def answered(asked: int) -> bytes:
    """Return an answer that is a list of versions, as good as any."""
    data = versions()(asked)
    return len(data).to_bytes(4, "big") + data


def question() -> Hello:
    """Return a request whose answer `answered` makes."""
    return Hello("1")


async def test_a_request_is_written_before_anything_is_awaited() -> None:
    wire, transport = wired()
    wire.send(question(), 5)
    size = int.from_bytes(transport.written[:4], "big")
    assert len(transport.written) == 4 + size
    assert transport.written[4:8] == b"\0\x12\0\3"
    assert b"brokerkit" in transport.written
    wire.close()


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5, 7, 100, 10_000])
async def test_answers_are_put_together_however_they_arrive(piece: int) -> None:
    wire, transport = wired()
    answers: list[asyncio.Future[Any]] = []
    data = b""
    for _ in range(5):
        answers.append(wire.send(question(), 5))
        data += answered(number(transport))
    for at in range(0, len(data), piece):
        wire.data_received(data[at : at + piece])
    for answer in answers:
        assert len((await answer)[1]) == len(SPOKEN) + 2
    assert not wire.closed
    wire.close()


async def test_each_request_has_its_own_deadline() -> None:
    wire, transport = wired()
    patient = wire.send(question(), 60)
    data = answered(number(transport))
    hasty = wire.send(question(), 0.05)
    wire.data_received(data)
    assert (await patient)[1]
    with pytest.raises(Unanswered, match=r"h:9092 did not answer ApiVersions within 0\.05 s"):
        await hasty
    assert wire.closed
    assert transport.aborted == 1


async def test_a_request_that_is_late_takes_those_behind_it_along() -> None:
    wire, _ = wired()
    closed: list[bool] = []
    wire.on_close = lambda: closed.append(wire.closed)
    first, second = wire.send(question(), 0.05), wire.send(question(), 60)
    with pytest.raises(Unanswered):
        await first
    with pytest.raises(Unanswered, match=r"it did not answer ApiVersions within 0\.05 s"):
        await second
    assert closed == [True]
    with pytest.raises(BrokerUnavailable, match="closed") as caught:
        wire.send(question(), 5)
    assert not isinstance(caught.value, Unanswered)


async def test_who_is_cancelled_takes_nobody_along() -> None:
    wire, transport = wired()
    cancelled = asyncio.ensure_future(wire.send(question(), 60))
    data = answered(number(transport))
    other = wire.send(question(), 60)
    data += answered(number(transport))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    wire.data_received(data)
    assert (await other)[1]
    assert not wire.closed
    wire.close()


async def test_a_broker_that_never_answers_who_was_cancelled_is_left_all_the_same() -> None:
    wire, _ = wired()
    over = asyncio.Event()
    wire.on_close = over.set
    wire.send(question(), 0.05).cancel()
    await asyncio.wait_for(over.wait(), 5)
    assert wire.closed


async def test_who_expires_answers_what_was_asked() -> None:
    wire, transport = wired()
    asked = [wire.send(question(), 60) for _ in range(2)]
    data = answered(number(transport))
    over = asyncio.Event()
    wire.on_close = over.set
    wire.expire(0.02)
    while not wire.closed:
        await asyncio.sleep(0.01)
    with pytest.raises(BrokerUnavailable, match="closed"):
        wire.send(question(), 5)
    assert not over.is_set()
    wire.data_received(answered(1))
    assert (await asked[0])[1]
    assert not over.is_set()
    wire.data_received(data)
    assert (await asked[1])[1]
    assert over.is_set()
    assert transport.aborted == 1


async def test_closing_twice_is_closing_once() -> None:
    wire, transport = wired()
    closed: list[bool] = []
    wire.on_close = lambda: closed.append(True)
    answer = wire.send(question(), 60)
    wire.close()
    wire.close()
    wire.connection_lost(None)
    assert closed == [True]
    assert transport.aborted == 1
    with pytest.raises(Unanswered, match="it was closed"):
        await answer
    assert repr(wire) == "<Wire h:9092 closed>"


@pytest.mark.parametrize(
    "lost, kind, text",
    [
        (None, Unanswered, "the broker closed it"),
        (ConnectionResetError(104, "Connection reset by peer"), Unanswered, "Connection reset"),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_BAD_RECORD_MAC] bad mac"), Unanswered, "TLS failed"),
    ],
)
async def test_a_connection_that_breaks_leaves_answers_unknown(
    lost: Exception | None, kind: type[BrokerError], text: str
) -> None:
    wire, _ = wired()
    answers = [wire.send(question(), 60) for _ in range(2)]
    wire.connection_lost(lost)
    for answer in answers:
        with pytest.raises(kind, match=text) as caught:
            await answer
        assert caught.value.__cause__ is lost
    assert wire.closed


@pytest.mark.parametrize(
    "data", [b"\0\0\0\4\0\0\0\x63", b"\0\0\0\5\0\0\0\1\xff", b"\xff\xff\xff\xff", (LARGEST + 1).to_bytes(4, "big")]
)
async def test_an_answer_that_makes_no_sense_ends_the_connection(data: bytes) -> None:
    wire, _ = wired()
    answer = wire.send(question(), 60)
    wire.data_received(data)
    with pytest.raises(BrokerError, match=r"not asked|cannot be read|not answer as Kafka") as caught:
        await answer
    assert not caught.value.retryable
    assert wire.closed


async def test_what_nobody_asked_for_ends_the_connection() -> None:
    wire, _ = wired()
    wire.data_received(b"\0\0\0\4\0\0\0\1")
    assert wire.closed


async def test_an_answer_that_nobody_waits_for_is_no_unhandled_error() -> None:
    seen: list[Mapping[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    wire, _ = wired()
    wire.send(question(), 60)
    wire.close()
    gc.collect()
    await asyncio.sleep(0)
    assert not seen


@pytest.mark.parametrize("listener", ["PLAIN", "SASLSSL"])
async def test_a_connection_that_is_closed_leaves_nothing(kafka: Endpoints, listener: Listener) -> None:
    tasks = asyncio.all_tasks()
    wire = await open_wire(read(kafka.url(listener), **files(kafka, listener)))
    answer = wire.send(metadata(), 60)
    wire.close()
    with pytest.raises(Unanswered):
        await answer
    assert asyncio.all_tasks() == tasks
    del wire, answer
    await asyncio.sleep(0)
    gc.collect()  # a socket that is still open would be a ResourceWarning, which is an error here


async def test_many_requests_share_a_connection(kafka: Endpoints) -> None:
    wire = await open_wire(read(kafka.url()))
    try:
        asked = [
            wire.send(metadata() if each % 2 else Request(FindCoordinatorRequest(key=f"wire-{each}")), 10)
            for each in range(50)
        ]
        for each, answer in enumerate(asked):
            assert hasattr(await answer, "brokers" if each % 2 else "node_id")
    finally:
        wire.close()


async def test_a_large_answer_comes_whole(kafka: Endpoints) -> None:
    """Of more bytes than the loop reads at once."""
    wire, transport = wired()
    answer = wire.send(question(), 5)
    data = answered(number(transport))
    padding = 3_000_000
    # A tagged field that a later version may have.
    body = data[4:-1] + b"\1\x63" + _varint(padding) + bytes(padding)
    data = len(body).to_bytes(4, "big") + body
    for at in range(0, len(data), 262_144):
        wire.data_received(data[at : at + 262_144])
    assert (await answer)[1]
    wire.close()


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])
