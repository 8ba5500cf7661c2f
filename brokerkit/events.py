"""What happened, as frozen values, for `connect(..., on_event=...)`: metrics, alarms, tests.

Events never carry values or bodies.  An event is made only where somebody listens, and what the listener raises is logged
and dropped: watching a service cannot break it.  Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.  *address* is the name of the topic or queue, *group* is None for a queue."""

    address: str
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribed(Event):
    """A subscription is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribed(Event):
    """A subscription has ended: it was closed, or drained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(Event):
    """A subscription lost the message system and tries again in *wait* seconds."""

    error: str
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """A subscription consumes again after `Disconnected`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handled(Event):
    """A handler finished and its message is being acknowledged."""

    id: str
    attempt: int
    took: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """An attempt failed; the next one comes in *wait* seconds."""

    id: str
    attempt: int
    error: str
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered(Event):
    """A message goes to the dead letters."""

    id: str
    attempt: int
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped(Event):
    """A message of an ephemeral reader failed for good; there are no dead letters for those."""

    id: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired(Event):
    """The time to live of *count* messages ran out before they were handled."""

    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost(Event):
    """A message in hand belongs to another consumer by now; its outcome had no effect here."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleFailed(Event):
    """An outcome could not be stored; it is tried again, or the message is delivered again."""

    id: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPaused(Event):
    """A partition stands, because its oldest unsettled message is too far behind."""

    partition: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionResumed(Event):
    """A partition that stood is read again."""

    partition: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionsLost(Event):
    """A group was overtaken by retention: *lost* messages were removed before it read them."""

    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrun(Event):
    """The handler thread of a message is over its timeout and cannot be cancelled; the message stays owned."""

    id: str
    handler: str
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBlocked(Event):
    """*handler* did not give the event loop back for *seconds*; nothing else ran meanwhile."""

    handler: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingSettled(Event):
    """The prefetch is full and nothing was settled for a lease: is an ``ack()`` missing?"""

    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained(Event):
    """A service has stopped.  *address* is its name."""

    finished: int
    cancelled: int
    released: int
    threads: int


Listener: TypeAlias = Callable[[Event], None]
"""Called in the event loop with each event; must not block."""
