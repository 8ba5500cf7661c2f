"""Messages for calling a handler by hand: nothing is connected, outcomes are only kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, TypeVar, overload

from .. import clock
from .._binding import Bound, Records
from .._outcome import Die, judge
from ..address import DeadLetters, Outgoing, Queue, Topic
from ..driver import Capabilities, Delivery, Record
from ..errors import ConfigError
from ..message import Message, Outcome
from ..policy import MAX_DELAY, TOPIC_WAIT, RetryPolicy, seconds, whole

T = TypeVar("T")

_EVERYTHING: Final = Capabilities(
    backend="a test message", replay=True, key_order=True, delay=True, priority=True, ttl=True, dedup=True, shared=True
)


@overload
def message(
    address: Topic[T],
    value: T,
    *,
    key: str | bytes | None = None,
    id: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempt: int = 1,
) -> Message[T]: ...
@overload
def message(
    address: Queue[T, Any],
    value: T,
    *,
    id: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempt: int = 1,
) -> Message[T]: ...
def message(
    address: Topic[Any] | Queue[Any, Any],
    value: object,
    *,
    key: str | bytes | None = None,
    id: str | None = None,
    headers: Mapping[str, str] | None = None,
    attempt: int = 1,
) -> Message[Any]:
    """Return a message of *address* for a direct call of a handler.

    The handler sees *value* as it comes out of its codec.  Afterwards ``outcome`` tells how the handler settled it (None: it
    left that to the service) and ``published`` what it staged::

        order = message(ORDERS, Order("o1", 10.0), key="ann")
        await bill(order)
        assert order.outcome is None
        assert [item.value for item in order.published] == ["o1: 10.00"]

    What the handler raises, `Reject` and `Nack` too, comes out of the call.  *attempt* 3 makes it the third attempt.

    Raises:
        EncodeError: *value* is not of the address's type.
        ConfigError: an option that makes no sense.
    """
    if isinstance(address, DeadLetters) or not isinstance(address, (Topic, Queue)):
        raise ConfigError(f"{address!r}: a handler's message is of a Topic or a Queue")
    whole("attempt", attempt, low=1, high=1_000_000)
    bound, records = _bound(address), Records(_clock())
    record = records.make(bound, value, key, id, headers)
    delivery = Delivery(record, token=None, position=f"{address.name}@test")
    return Message(delivery, bound, _Recorder(records, in_place=isinstance(address, Topic)), attempt - 1)


def _bound(address: Topic[Any] | Queue[Any, Any]) -> Bound:
    return Bound(address, address, _EVERYTHING)


def _clock() -> clock.Clock:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return clock.SYSTEM
    return clock.current()


class _Recorder:
    """The settler of a message that belongs to nobody: what it is told stays on the message."""

    def __init__(self, records: Records, *, in_place: bool) -> None:
        self._records = records
        self._in_place = in_place

    async def settle(self, message: Message[Any], outcome: Outcome, confirm: bool) -> None:
        """Do nothing: the message keeps its outcome by itself."""

    async def failed(self, message: Message[Any], error: BaseException, retry: RetryPolicy) -> None:
        """Give *message* the outcome that a subscription would carry out."""
        verdict = judge(error, retry, message.attempt, in_place=self._in_place)
        if isinstance(verdict, Die):
            message._outcome = Outcome("reject", reason=verdict.reason)
        else:
            message._outcome = Outcome("nack", delay=verdict.wait)

    async def stage(self, message: Message[Any], item: Outgoing[object]) -> Record:
        """Check and encode *item* as a broker would that can do everything."""
        if not isinstance(item.address, (Topic, Queue)):
            raise ConfigError(f"{item.address!r}: publish to a Topic or a Queue")
        return self._records.outgoing(_bound(item.address), item)

    def check(self, outcome: Outcome) -> None:
        """Raise if messages of this address cannot have *outcome*."""
        if outcome.kind == "nack":
            seconds("delay", outcome.delay, high=MAX_DELAY)
            if self._in_place and outcome.delay > TOPIC_WAIT:
                raise ValueError(
                    f"nack(delay={outcome.delay:g}) on a topic: it holds its key, so at most {TOPIC_WAIT:g} s"
                )
