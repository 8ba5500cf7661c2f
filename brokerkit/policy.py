"""Frozen values that say how: retries, where to start reading, batches, limits.  Times are seconds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Final, Literal, final

from .errors import ConfigError

MAX_BODY: Final = 1024 * 1024
"""Largest body in bytes."""
MAX_KEY: Final = 1024
"""Largest key in bytes."""
MAX_ID: Final = 200
"""Longest message id in characters."""
MAX_HEADERS: Final = 64
"""Most headers a user may set on one message."""
MAX_HEADER_BYTES: Final = 16 * 1024
"""Names and values of all headers of one message together, in UTF-8 bytes."""
MAX_REASON: Final = 1024
"""Longest reason or error text kept in a dead letter, in characters; longer ones are cut."""
MAX_DELAY: Final = 366 * 86400.0
"""Longest delay or time to live."""
MAX_PREFETCH: Final = 10_000
MAX_CONCURRENCY: Final = 10_000
TOPIC_WAIT: Final = 60.0
"""Longest wait before a topic's message is tried again in place; it holds its key meanwhile."""
QUEUE_WAIT: Final = 300.0
"""Default of `RetryPolicy.wait_max` on queues."""
LONE_DELIVERY: Final = 3
"""From this delivery on without an outcome a message is handed out alone, so that only the guilty one keeps counting."""
LOG_WINDOW: Final = 16_384
"""Records that the tracker of a partition can cover beyond the oldest unsettled one."""
LOG_AHEAD: Final = LOG_WINDOW // 4
"""How far a partition is read beyond its oldest unsettled record: what one blocked key may hold back."""


def seconds(name: str, value: float, *, low: float = 0.0, high: float = MAX_DELAY) -> float:
    """Return *value* as a float of seconds, or raise `ConfigError` naming the option."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number of seconds from {low:.10g} to {high:.10g}, not {value!r}")
    return float(value)


def whole(name: str, value: int, *, low: int, high: int) -> int:
    """Return *value*, a whole number within bounds, or raise `ConfigError` naming the option."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return value


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How a failed message is tried again.

    *attempts* counts the first run, so 1 means no retry.  Before attempt n + 1 the wait is
    ``min(wait_max, wait_initial * 2 ** (n - 1))`` seconds, of which the fraction *wait_jitter* is drawn at random: 1.0 is
    full jitter (anything from nothing to the whole wait), 0 is none.  *wait_max* None means 60 on topics and 300 on queues.
    An exception outside *on* is not retried but dead-lettered at once.

    Raises:
        ConfigError: a number out of its range, or *on* is no exception class.
    """

    attempts: int = 5
    wait_initial: float = 1.0
    wait_max: float | None = None
    wait_jitter: float = 1.0
    on: type[Exception] | tuple[type[Exception], ...] = Exception

    def __post_init__(self) -> None:
        whole("RetryPolicy.attempts", self.attempts, low=1, high=1_000_000)
        seconds("RetryPolicy.wait_initial", self.wait_initial)
        if self.wait_max is not None:
            seconds("RetryPolicy.wait_max", self.wait_max)
        if not 0 <= seconds("RetryPolicy.wait_jitter", self.wait_jitter) <= 1:
            raise ConfigError(f"RetryPolicy.wait_jitter is a fraction from 0 to 1, not {self.wait_jitter!r}")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise ConfigError(f"RetryPolicy.on must be an exception class or a tuple of them, not {self.on!r}")

    def wait(self, failures: int, *, longest: float, random_: random.Random | None = None) -> float:
        """Return the seconds to wait after *failures* failed attempts; *longest* stands in for ``wait_max=None``."""
        limit = longest if self.wait_max is None else self.wait_max
        full = min(limit, self.wait_initial * 2.0 ** min(failures - 1, 64))
        drawn = (random_ or _RANDOM).random()
        return full * (1.0 - self.wait_jitter * drawn)


_RANDOM = random.Random()


def backoff(failures: int, *, initial: float = 0.1, longest: float = 10.0) -> float:
    """Return the seconds before reconnect attempt number *failures* + 1, with full jitter."""
    return _RANDOM.random() * float(min(longest, initial * 2.0 ** min(failures, 32)))


@final
@dataclass(frozen=True, slots=True, repr=False)
class Start:
    """Where reading a topic begins: `EARLIEST`, `LATEST`, `at` a time or from a `position`."""

    kind: Literal["earliest", "latest", "time", "position"]
    value: str | float = field(default="")
    EARLIEST: ClassVar[Start]
    LATEST: ClassVar[Start]

    @staticmethod
    def at(when: datetime, /) -> Start:
        """Begin with the first message published at or after *when*, an aware datetime."""
        if not isinstance(when, datetime) or when.tzinfo is None:
            raise ConfigError(f"Start.at needs a datetime with a time zone, not {when!r}")
        return Start("time", when.timestamp())

    @staticmethod
    def position(position: str, /) -> Start:
        """Begin with the message at *position* (of `Message.position`): its partition from there on, others by its time."""
        if not isinstance(position, str) or not position:
            raise ConfigError(f"Start.position needs the text of a Message.position, not {position!r}")
        return Start("position", position)

    def __repr__(self) -> str:
        match self.kind:
            case "earliest" | "latest":
                return f"Start.{self.kind.upper()}"
            case "time":
                return f"Start.at({self.value!r})"
            case "position":
                return f"Start.position({self.value!r})"


Start.EARLIEST = Start("earliest")
Start.LATEST = Start("latest")


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Hand several messages to one handler call: at most *max*, waiting at most *wait* seconds for them."""

    max: int
    wait: float = 0.5

    def __post_init__(self) -> None:
        whole("Batch.max", self.max, low=1, high=MAX_PREFETCH)
        seconds("Batch.wait", self.wait, high=3600.0)


@final
class EveryReplica:
    """The type of `EVERY_REPLICA`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EVERY_REPLICA"


EVERY_REPLICA: Final = EveryReplica()
"""As a group: every process reads every message, from now on, and leaves nothing behind."""
