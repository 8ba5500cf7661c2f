"""What happened, as frozen values, for `connect(..., on_event=...)`: metrics, alarms, tests.

Events never carry values or bodies.  An event is made only where somebody listens, and what the listener raises is logged
and dropped: watching a service cannot break it.  Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events.  *address* is the name of the topic or queue, *group* is None for a queue."""

    address: str
    group: str | None = None


class Subscribed(Event, frozen=True, kw_only=True):
    """A subscription is ready."""


class Unsubscribed(Event, frozen=True, kw_only=True):
    """A subscription has ended: it was closed, or drained."""


class Disconnected(Event, frozen=True, kw_only=True):
    """A subscription lost the message system and tries again in *wait* seconds."""

    error: str
    wait: float


class Resumed(Event, frozen=True, kw_only=True):
    """A subscription consumes again after `Disconnected`."""


class Handled(Event, frozen=True, kw_only=True):
    """A handler finished and its message is being acknowledged."""

    id: str
    attempt: int
    took: float


class Retried(Event, frozen=True, kw_only=True):
    """An attempt failed; the next one comes in *wait* seconds."""

    id: str
    attempt: int
    error: str
    wait: float


class DeadLettered(Event, frozen=True, kw_only=True):
    """A message goes to the dead letters."""

    id: str
    attempt: int
    reason: str
    error: str


class Dropped(Event, frozen=True, kw_only=True):
    """A message of an ephemeral reader failed for good; there are no dead letters for those."""

    id: str
    attempt: int
    reason: str


class Expired(Event, frozen=True, kw_only=True):
    """The time to live of *count* messages ran out before they were handled."""

    count: int = 1


class Lost(Event, frozen=True, kw_only=True):
    """A message in hand belongs to another consumer by now; its outcome had no effect here."""

    id: str


class SettleFailed(Event, frozen=True, kw_only=True):
    """An outcome could not be stored; it is tried again, or the message is delivered again."""

    id: str
    error: str


class PartitionPaused(Event, frozen=True, kw_only=True):
    """A partition stands, because its oldest unsettled message is too far behind."""

    partition: int


class PartitionResumed(Event, frozen=True, kw_only=True):
    """A partition that stood is read again."""

    partition: int


class UpkeepFailed(Event, frozen=True, kw_only=True):
    """What serves a queue in the background does not work; it is tried again, and this is told once until it works.

    *task* is "delay", what moves messages on when their time has come, or "keeping", what deletes those that are done.
    """

    task: str
    error: str


class PositionsLost(Event, frozen=True, kw_only=True):
    """A group was overtaken by retention: *lost* messages were removed before it read them."""

    lost: int


class Overrun(Event, frozen=True, kw_only=True):
    """The handler thread of a message is over its timeout and cannot be cancelled; the message stays owned."""

    id: str
    handler: str
    timeout: float


class LoopBlocked(Event, frozen=True, kw_only=True):
    """*handler* did not give the event loop back for *seconds*; nothing else ran meanwhile."""

    handler: str
    seconds: float


class NothingSettled(Event, frozen=True, kw_only=True):
    """The prefetch is full and nothing was settled for a lease: is an ``ack()`` missing?"""

    in_flight: int


class Drained(Event, frozen=True, kw_only=True):
    """A service has stopped.  *address* is its name."""

    finished: int
    cancelled: int
    released: int
    threads: int


Listener: TypeAlias = Callable[[Event], None]
"""Called in the event loop with each event; must not block."""
