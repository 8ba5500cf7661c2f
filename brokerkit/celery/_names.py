"""What queues and exchanges of Celery are called in brokerkit, one name each."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any, Final

from ..address import MAX_NAME, Queue, Topic, internal
from ._envelope import JSON, Envelope

QUEUE_PREFIX: Final = "celery."
"""Before each queue's name: queues of these names are not those of a plain program, nor the topics of Celery's own Kafka transport."""
LONGEST: Final = MAX_NAME - len(QUEUE_PREFIX)
EXCHANGE_RETENTION: Final = 3600.0
EVENTS: Final = "celeryev"
EVENTS_RETENTION: Final = 300.0
"""Seconds that events of workers are kept for readers that were cut off: there are several for each task."""
REVOKED_RETENTION: Final = 30 * 86400.0
MANY: Final = 10_000
"""Addresses that are kept at hand."""

_PLAIN: Final = re.compile(rb"[A-Za-z0-9-]+")
_HEX: Final = re.compile(rb"[0-9a-f]{2}")
_CUT: Final = "_2d"  # the escape of a dash, which needs none: no name that is written out has it
_HASH: Final = 40


def encode(name: str) -> str:
    """Return *name* in letters, digits, ``-`` and ``_``, at most 93 of them: another text for another name.

    Other bytes of its UTF-8 become ``_`` and two hexadecimal digits, the dot too: Kafka refuses a topic whose name differs
    from another one's only in dots and underscores.  An underscore before what could be such digits is written so as well,
    so that reading backwards gives the name.  Of a name that is too long then, the beginning is kept, and a SHA-256 hash of it.
    """
    data = name.encode("utf-8", "surrogatepass")
    out: list[str] = []
    at = 0
    while at < len(data):
        plain = _PLAIN.match(data, at)
        if plain is not None:
            out.append(plain.group().decode("ascii"))
            at = plain.end()
        else:
            byte = data[at]
            at += 1
            out.append("_" if byte == 0x5F and not _HEX.match(data, at) else f"_{byte:02x}")
    text = "".join(out)
    if len(text) <= LONGEST:
        return text
    return text[: LONGEST - len(_CUT) - _HASH] + _CUT + sha256(data).hexdigest()[:_HASH]


class _AsItIs:
    """The codec of what is JSON already."""

    content_type = JSON

    def encode(self, value: bytes, /) -> bytes:
        return value

    def decode(self, body: bytes, _headers: object, /) -> bytes:
        return body


_RAW: Final = _AsItIs()


def service_queue(name: str, *, priorities: int = 10, lease: float = 15) -> Queue[Envelope]:
    """Return the address of Celery's queue *name*, for services and publishers of brokerkit beside Celery.

    *priorities* is 10 on Redis and in memory, and 1 on Kafka, which has none.
    """
    return Queue(QUEUE_PREFIX + encode(name), Envelope, priorities=priorities, lease=lease)


class Names:
    """The addresses of one broker: the same object for the same name, which is the short way through publishing."""

    def __init__(self, *, priorities: int, lease: float) -> None:
        self.priorities = priorities
        self._lease = lease
        self._queues: dict[str, Queue[bytes]] = {}
        self._exchanges: dict[str, Topic[bytes]] = {}
        self.bindings: Topic[bytes] = _topic("bindings", retention=None)
        """Which queue is bound to which exchange: the last record of each binding counts."""
        self.revokes: Topic[bytes] = _topic("revokes", retention=REVOKED_RETENTION)

    def queue(self, name: str) -> Queue[bytes]:
        """Return the address of the durable queue *name*."""
        queue = self._queues.get(name)
        if queue is None:
            if len(self._queues) >= MANY:
                self._queues.clear()
            queue = self._queues[name] = Queue(
                QUEUE_PREFIX + encode(name), bytes, priorities=self.priorities, lease=self._lease, codec=_RAW
            )
        return queue

    def exchange(self, name: str) -> Topic[bytes]:
        """Return the topic of the exchange *name*, from which its transient queues are read; ``""`` is the default exchange."""
        topic = self._exchanges.get(name)
        if topic is None:
            if len(self._exchanges) >= MANY:
                self._exchanges.clear()
            parts = ("exchange", encode(name)) if name else ("exchange",)
            topic = self._exchanges[name] = _topic(
                *parts, retention=EVENTS_RETENTION if name == EVENTS else EXCHANGE_RETENTION
            )
        return topic


def _topic(*parts: str, retention: float | None) -> Topic[bytes]:
    plain: Topic[Any] = Topic("celery", bytes, partitions=1, retention=retention, codec=_RAW)
    return plain._named(internal("bk", "celery", *parts))
