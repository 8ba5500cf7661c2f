"""Sending: what is certainly not stored is sent again in time, what may be stored never is, and order holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

import brokerkit
from brokerkit import Topic
from brokerkit._publishing import CHUNK, send
from brokerkit.address import Address
from brokerkit.driver import Receipt, Record
from brokerkit.errors import (
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    BufferFull,
    NotAttempted,
    PublishUnknown,
)
from brokerkit.testing import VirtualLoop, faults

ORDERS = Topic("orders", str)


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(0)) as runner:
        runner.run(main)


class Script:
    """A driver whose answers to each record are written down beforehand; stored once they are used up."""

    def __init__(self, **answers: list[BrokerError]) -> None:
        self.answers = answers
        self.calls: list[list[str]] = []

    async def publish(self, records: Sequence[Record], *, timeout: float) -> Sequence[Receipt | BrokerError]:
        self.calls.append([record.id for record in records])
        return [self.answers[r.id].pop(0) if self.answers.get(r.id) else Receipt(r.id) for r in records]


def records(*ids: str, key: bytes | None = b"k", address: Address = ORDERS) -> list[Record]:
    return [Record(address, id, b"", key) for id in ids]


@pytest.mark.parametrize("error", [BrokerUnavailable("no answer"), BufferFull("no room"), NotAttempted("not now")])
def test_what_is_certainly_not_stored_is_sent_again(error: BrokerError) -> None:
    script = Script(a=[error, error])

    async def main() -> None:
        results = await send(script, asyncio.get_running_loop().clock, records("a"), 30)  # type: ignore[arg-type,attr-defined]
        assert [type(result) for result in results] == [Receipt]

    run(main())
    assert script.calls == [["a"]] * 3


@pytest.mark.parametrize("error", [PublishUnknown("no answer"), AuthorizationError("not allowed")])
def test_what_may_be_stored_or_never_will_be_is_not_sent_again(error: BrokerError) -> None:
    script = Script(a=[error])

    async def main() -> None:
        assert await send(script, asyncio.get_running_loop().clock, records("a"), 30) == [error]  # type: ignore[arg-type,attr-defined]

    run(main())
    assert script.calls == [["a"]]


def test_sending_again_ends_in_time() -> None:
    error = BrokerUnavailable("no answer")
    script = Script(a=[error] * 10_000)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await send(script, loop.clock, records("a"), 30) == [error]  # type: ignore[arg-type,attr-defined]
        assert 28 <= loop.time() - began <= 30

    run(main())
    assert len(script.calls) > 20


def test_behind_a_final_failure_its_key_stays_unsent() -> None:
    final, later = AuthorizationError("not allowed"), NotAttempted("an earlier one failed")
    script = Script(b=[final], c=[later])

    async def main() -> None:
        chunk = [*records("a", "b", "c"), *records("d", key=b"other")]
        results = await send(script, asyncio.get_running_loop().clock, chunk, 30)  # type: ignore[arg-type,attr-defined]
        assert [type(result) for result in results] == [Receipt, AuthorizationError, NotAttempted, Receipt]

    run(main())
    assert script.calls == [["a", "b", "c", "d"]]


def test_behind_a_failure_that_passes_its_key_is_sent_in_order() -> None:
    script = Script(a=[BufferFull("no room")], b=[NotAttempted("an earlier one failed")])

    async def main() -> None:
        results = await send(script, asyncio.get_running_loop().clock, records("a", "b"), 30)  # type: ignore[arg-type,attr-defined]
        assert [type(result) for result in results] == [Receipt, Receipt]

    run(main())
    assert script.calls == [["a", "b"], ["a", "b"]]


def test_publish_many_keeps_the_order_of_a_key_over_all_its_calls_to_the_driver() -> None:
    async def main() -> None:
        async with brokerkit.connect("memory://") as broker:
            await broker.declare(ORDERS)
            faults(broker).fail_publishes(AuthorizationError("not allowed"))
            items = [ORDERS.outgoing(str(number), key="k" if number % 2 else "other") for number in range(2 * CHUNK)]
            items[0] = ORDERS.outgoing("first", key="k")
            results = await broker.publish_many(ORDERS, items)
            assert isinstance(results[0], AuthorizationError)
            assert {type(result) for result in results[1::2]} == {NotAttempted}
            assert {type(result) for result in results[2::2]} == {Receipt}

    run(main())
