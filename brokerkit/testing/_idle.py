"""Knowing when everything is done: what handlers run, what sources still hold, and waiting until there is nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from .._intake import Feed, Intake
from .._session import Session
from ..address import Address, AnyTopic, Topic, redrive_queue
from ..broker import Broker
from ..driver import Backlog
from ..errors import BrokerError, NotFound
from ..message import Message
from ..middleware import CallNext
from ..policy import seconds
from ._loop import VirtualLoop

TURNS = 20
"""Turns of a usual loop to wait for without a timer: on memory, most that is ready is done within them."""
POLL = 0.02
"""Longest pause between two looks in a usual loop, in seconds."""

ANSWER = 5.0
"""Seconds that a message system gets to say what it holds."""


class NotIdle(BrokerError, TimeoutError):
    """There was something left to do when the time was up; the text lists it."""


class Watch:
    """The middleware that `running` adds: knows which handlers run and which messages they finished."""

    def __init__(self) -> None:
        self.inside: dict[Message[Any], None] = {}
        """What handlers have in hand, acknowledged or not."""
        self._finished: list[Message[Any]] = []

    @staticmethod
    def of(broker: Broker) -> Watch | None:
        """Return the one that *broker* has, if a service was run on it inside of `running`."""
        return next((found for found in broker.middleware if isinstance(found, Watch)), None)

    async def __call__(self, message: Any, call_next: CallNext, /) -> object:
        """Note that a handler runs, and that it has finished without an error."""
        batch = cast("Message[Any] | Sequence[Message[Any]]", message)
        messages: tuple[Message[Any], ...] = (batch,) if isinstance(batch, Message) else tuple(batch)
        self.inside.update(dict.fromkeys(messages))
        try:
            result = await call_next(message)
        finally:
            for one in messages:
                del self.inside[one]
        self._finished.extend(messages)
        return result

    def handled(self, address: Address, group: str | None) -> list[Message[Any]]:
        """Return what was finished and acknowledged, of *address* as the driver knows it."""
        return [message for message in self._finished if _acknowledged(message) and _is_of(message, address, group)]


def _acknowledged(message: Message[Any]) -> bool:
    return message.outcome is not None and message.outcome.kind == "ack"


def _is_of(message: Message[Any], address: Address, group: str | None) -> bool:
    plan = _session(message).plan
    its_group = plan.source.group if plan.letters is None else plan.letters.group
    if group is not None and group != its_group:
        return False
    at = message._item.record.address
    return at == address or (isinstance(address, Topic) and its_group is not None and _redriven(at, address, its_group))


def _redriven(at: Address, topic: AnyTopic, group: str) -> bool:
    return at == redrive_queue(topic, group)


def _session(message: Message[Any]) -> Session:
    session = message._settler
    assert isinstance(session, Session)
    return session


async def idle(broker: Broker, timeout: float = 30) -> None:
    """Wait until nothing is left to do in all that is consumed through *broker*.

    That is: no message waits, is in hand or is delayed in the topics' groups and queues that its services and subscriptions
    read, retries and what handlers publish included; no handler runs, and no request waits for its reply.  Queues that nobody
    reads here do not count; nor, except on ``memory://``, does what an `EVERY_REPLICA` handler has not been given yet.  In
    virtual time an hour's delay takes none, but *timeout* has to allow it.

    Raises:
        NotIdle: something is left after *timeout* seconds; the text lists it.  It is a `TimeoutError`.
    """
    broker._check()
    seconds("timeout", timeout)
    pause = _Pause()
    try:
        async with asyncio.timeout(timeout):
            while await _look(broker, pause) or not pause.calm(_ephemeral(broker)):
                await pause.wait()
    except TimeoutError:
        await pause.end()
        left = await _look(broker, pause)
        if left:
            listed = "\n".join(f"  {line}" for line in left)
            raise NotIdle(f"not idle after {timeout:g} s; left to do:\n{listed}") from None


class _Pause:
    """Waits for something to happen between two looks."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn = 0
        self._moves = 0
        self._waited = False
        self._before: object = None

    def begin(self, state: object) -> None:
        """Note that a look begins, and what it can see at once: *state*."""
        if isinstance(self._loop, VirtualLoop):
            self._moves = self._loop.moves
        elif state != self._before:
            self._before, self._turn = state, 0

    def calm(self, ephemeral: bool) -> bool:
        """Return whether what is ready has run: no backlog tells what an *ephemeral* reader has not been given yet."""
        return self._waited if isinstance(self._loop, VirtualLoop) else not ephemeral or self._turn >= TURNS

    async def end(self) -> None:
        """Let run what became ready together with the timeout: in virtual time both can come in the same moment."""
        if isinstance(self._loop, VirtualLoop):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await self._loop.quiet()

    async def wait(self) -> None:
        """Return when another look may see something else."""
        if isinstance(self._loop, VirtualLoop):
            await self._loop.quiet(after=self._moves if self._waited else -1)
            self._waited = True
            return
        self._turn += 1
        await asyncio.sleep(0 if self._turn <= TURNS else min(POLL, 0.001 * 2 ** (self._turn - TURNS)))


async def _look(broker: Broker, pause: _Pause) -> list[str]:
    """Return one line for each source, request and handler that is not done; none if all is.

    A message can move from a source that was not asked yet to one that was: a handler's publication is stored in the moment
    in which its own message is settled.  So what was seen counts only if this broker settled nothing meanwhile.
    """
    while True:
        before = _state(broker)
        pause.begin(before)
        left = [line for feed in _feeds(broker) if (line := await _left_of(broker, feed))]
        left += _local(broker)
        if left or _state(broker) == before:
            return left


def _feeds(broker: Broker) -> list[Feed]:
    """Return one feed of each source: two services in one group read the same."""
    found = {(feed.plan.source.address, feed.plan.source.group, feed.plan.letters): feed for feed in _all(broker)}
    return list(found.values())


def _all(broker: Broker) -> list[Feed]:
    intakes: list[Intake] = sorted(broker._intakes, key=lambda intake: intake.feeds[0].plan.name)
    return [feed for intake in intakes for feed in intake.feeds]


def _state(broker: Broker) -> list[tuple[int, int, int]]:
    """Return what changes with everything that this broker receives or settles."""
    sessions = [feed.session for feed in _all(broker) if feed.session is not None]
    return [(id(session), session.held, session.settled) for session in sessions]


def _ephemeral(broker: Broker) -> bool:
    """Return whether a service on *broker* reads a topic without a group."""
    return any(feed.plan.letters is None and not feed.plan.by_hand for feed in _all(broker))


async def _left_of(broker: Broker, feed: Feed) -> str:
    """Say what is left in the source of *feed*, "" if nothing."""
    plan = feed.plan
    held = sum(
        other.session.held for other in _all(broker) if other.session is not None and other.plan.source == plan.source
    )
    if plan.letters is None:
        # An ephemeral reader owes nothing to anybody; only what its handlers have in hand is to be done.
        return "" if plan.by_hand or not held else f"{plan.name}: {held} in hand"
    try:
        async with asyncio.timeout(ANSWER):
            backlog = await broker._driver.backlog(plan.source)
    except NotFound:
        backlog = Backlog()
    except TimeoutError:
        return f"{plan.name}: cannot be looked at: no answer within {ANSWER:g} s"
    except BrokerError as error:
        return f"{plan.name}: cannot be looked at: {type(error).__name__}: {error}"
    parts = [
        (backlog.waiting or 0, "waiting"),
        (max(backlog.in_flight or 0, held), "in flight"),
        (backlog.delayed or 0, "delayed"),
    ]
    counts = ", ".join(f"{count} {what}" for count, what in parts if count)
    by_hand = " (in a subscription by hand: receive and settle them)" if plan.by_hand and held else ""
    return f"{plan.name}: {counts}{by_hand}" if counts else ""


def _local(broker: Broker) -> list[str]:
    """Return what no driver knows of: handlers that run on after settling, requests that wait."""
    watch, inbox = Watch.of(broker), broker._inbox
    lines = [f"{message!r}: its handler runs" for message in (watch.inside if watch is not None else ())]
    waiting = 0 if inbox is None else len(inbox._waiting)
    if waiting:
        lines.append(f"requests that wait for their reply: {waiting}")
    return lines
