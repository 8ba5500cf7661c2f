"""A message between a queue and a consumer of Kombu."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, TypeAlias

from ..errors import BrokerError
from ..message import Message
from ._feed import Feed
from ._mailboxes import Mailbox

PUBLISHED: Final = "celery-published"
"""The header of a copy that says when the message was published, in seconds since the epoch."""


class Item:
    """A message on its way to a consumer of Kombu: each is settled once, by its intake."""

    __slots__ = ("also", "box", "early", "feed", "message", "no_ack", "payload", "queue", "since")

    def __init__(
        self,
        queue: str,
        payload: dict[str, Any],
        no_ack: bool,
        feed: Feed | None,
        message: Message[bytes] | None,
        box: Mailbox | None,
    ) -> None:
        self.queue = queue
        self.payload = payload
        """What Kombu makes its message of."""
        self.no_ack = no_ack
        """Its consumer does not acknowledge: that is done when it is handed over."""
        self.feed = feed
        self.message = message
        self.box = box
        self.early = False
        """Not due yet when it came."""
        self.since = 0.0
        """When it came, or was handed over, on the monotonic clock."""
        self.also: list[Message[bytes]] | None = None
        """The same message, stored more than once: these end with it."""

    async def replace(self, message: Message[bytes]) -> None:
        """Be settled by *message*: the same one, which came again."""
        before, self.message = self.message, message
        if before is None or before._settler is not message._settler:
            return  # what a lost connection has left behind settles nothing any more
        if before.position == message.position:
            with suppress(BrokerError):
                await before.release()  # its lease was lost: nobody gets it by this, but its session forgets it
        elif self.also is None:
            self.also = [before]
        else:
            self.also.append(before)


def published(message: Message[bytes]) -> float:
    """Return when *message*, or what it is a copy of, was published, in seconds since the epoch."""
    try:
        return float(message.headers[PUBLISHED])
    except (KeyError, ValueError):
        return message.timestamp.timestamp()


Key: TypeAlias = tuple[str, str, float, int]


def key_of(queue: str, message: Message[bytes]) -> Key:
    """Return what *message* of *queue* has in common with itself when it comes again, but with no copy that was marked.

    Others may have its id, if a service has chosen that, and on Kafka its time, which is in milliseconds.
    """
    record = message._item.record
    return queue, record.id, record.timestamp, hash(record.body)
