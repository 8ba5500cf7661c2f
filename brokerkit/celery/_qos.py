"""What a channel has handed out: messages, and those of them that are not settled."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Protocol, cast

import orjson
from kombu.exceptions import DecodeError
from kombu.message import Message as BaseMessage
from kombu.serialization import registry
from kombu.transport import virtual
from kombu.utils import json as kombu_json

from ._item import Item

_UNLIKE = re.compile(rb'"__type__"|\d{19}')
"""What orjson reads otherwise than kombu: values that JSON has not, and integers of more than 64 bits."""


class Message(virtual.Message):  # type: ignore[misc]
    """A message as kombu's consumers get it."""

    def __init__(self, payload: dict[str, Any], channel: object = None, tag: str | None = None) -> None:
        self._raw = payload
        properties = payload["properties"]
        BaseMessage.__init__(
            self,
            body=payload["body"],
            channel=channel,
            delivery_tag=tag or properties.get("delivery_tag"),
            content_type=payload["content-type"],
            content_encoding=payload["content-encoding"],
            headers=payload["headers"],
            properties=properties,
            delivery_info=properties.get("delivery_info"),
            postencode="utf-8",
        )

    def _decode(self) -> Any:
        if "task" not in self.headers:
            return self._read()
        # Celery's worker ends over a task that is none, acknowledged by nobody, and so does the next one: this it rejects.
        from celery.exceptions import InvalidTaskError

        try:
            value = self._read()
        except DecodeError as error:
            raise InvalidTaskError(f"its body cannot be read: {error}") from error
        if not _is_task(value):
            raise InvalidTaskError("its body is not [args, kwargs, embed]")
        return value

    def _read(self) -> Any:
        # Each task is read twice, and kombu's reader calls a function for every object in it.
        body: Any = self.body
        if (
            self.content_type == "application/json"
            and body.__class__ is bytes
            and not _UNLIKE.search(body)
            and (self.accept is None or "application/json" in self.accept)
            and registry._decoders.get("application/json") is kombu_json.loads
            and (self.accept is not None or "application/json" not in registry._disabled_content_types)
        ):
            with suppress(ValueError):  # NaN and lone surrogates, which Python's JSON has
                return orjson.loads(body)
        return super()._decode()


def _is_task(value: Any) -> bool:
    if isinstance(value, dict):
        return "args" in value  # as in Celery's first protocol
    if not isinstance(value, (list, tuple)):
        return False
    parts = tuple(cast("list[object]", value))
    return (
        len(parts) == 3
        and isinstance(parts[0], (list, tuple))
        and isinstance(parts[1], dict)
        and (parts[2] is None or isinstance(parts[2], dict))
    )


class Settling(Protocol):
    """What settles messages: a channel."""

    def acknowledge(self, item: Item) -> None:
        """Have *item* acknowledged."""
        ...

    def refuse(self, items: list[Item], requeue: bool) -> None:
        """Have *items* put back, or put to the dead letters."""
        ...


class QoS(virtual.QoS):  # type: ignore[misc]
    """The unsettled messages of a channel; any thread may settle them.

    Unlike its base it has no finalizer: what a process leaves unsettled goes back to the broker by its lease at the latest.
    """

    channel: Settling
    prefetch_count: int

    def __init__(self, channel: Settling, prefetch_count: int = 0) -> None:
        self.channel = channel
        self.prefetch_count = prefetch_count
        self.items: dict[str, Item] = {}
        self._delivered: dict[str, Any] = {}
        """Taken by code that looks at a virtual transport's inside; `items` is what counts."""

    def can_consume(self) -> bool:
        """Tell whether there is room for one more message."""
        count = self.prefetch_count
        return not count or len(self.items) < count

    def can_consume_max_estimate(self) -> int | None:
        """Return for how many more messages there is room; None for any number."""
        count = self.prefetch_count
        return max(count - len(self.items), 0) if count else None

    def append(self, message: Any, delivery_tag: str) -> None:
        """Messages come in by `Channel.hand_over` alone."""
        raise NotImplementedError

    def get(self, delivery_tag: str) -> Item:
        """Return what is to be settled by *delivery_tag*."""
        return self.items[delivery_tag]

    def ack(self, delivery_tag: str) -> None:
        """Settle as done; it leaves at once, together with what else is settled meanwhile."""
        item = self.items.pop(delivery_tag, None)
        if item is not None:
            self.channel.acknowledge(item)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Settle as not done: back to the queue, or to its dead letters."""
        item = self.items.pop(delivery_tag, None)
        if item is not None:
            self.channel.refuse([item], requeue)

    def restore_unacked(self) -> list[Any]:
        """Put all that is unsettled back to the queues."""
        items = list(self.items.values())
        self.items.clear()
        if items:
            self.channel.refuse(items, True)
        return []

    def restore_unacked_once(self, stderr: object = None) -> None:
        """Do nothing: closing the channel does it."""
