"""What a channel has handed out and not settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.transport import virtual

from ._item import Item

if TYPE_CHECKING:
    from ._channel import Channel


class QoS(virtual.QoS):  # type: ignore[misc]
    """The unsettled messages of a channel; any thread may settle them.

    Unlike its base it has no finalizer: what a process leaves unsettled goes back to the broker by its lease at the latest.
    """

    channel: Channel
    prefetch_count: int

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
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
