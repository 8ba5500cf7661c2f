"""The synchronous side of a channel: what kombu and Celery call, in their threads."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Any, Protocol, cast

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.uuid import uuid

from ..errors import BrokerError, Closed, NotFound
from . import _collect
from ._bridge import MORE, Bridge
from ._envelope import seal
from ._exchanges import EVENTS_PREFIX
from ._feed import Feed
from ._intake import Intake
from ._item import Item
from ._qos import Message as _Message
from ._qos import QoS as _QoS

logger = logging.getLogger("brokerkit")

PUBLISH_TIMEOUT = 10.0
"""Seconds that one attempt to publish may take, where the caller does not say; Celery makes several."""
STALE = 0.5
"""Seconds after which it is asked whether a message that waited to be handed over is still ours."""
CLOSE_TIMEOUT = 15.0
"""Seconds that closing a channel may take."""

_tags = count(1)


class Carrier(Protocol):
    """The connection of a channel, and what wakes the thread that drains its events."""

    bridge: Bridge
    client: Any

    def deliver(self, channel: Channel, items: Sequence[Item]) -> None:
        """Take *items* for that thread; called on the loop."""
        ...

    def fail(self, error: BaseException) -> None:
        """Have *error* raised in that thread; called on the loop."""
        ...

    def take_back(self, channel: Channel, queue: str | None) -> list[Item]:
        """Return what was delivered to *channel* (of *queue*) and not handed out."""
        ...

    def pace(self, channel: Channel) -> None:
        """Call `Channel.pace` again and again."""
        ...

    def close_channel(self, channel: Channel) -> None:
        """Forget *channel*."""
        ...

    def next_channel_id(self) -> int:
        """Return a number for a new channel."""
        ...


class Channel(virtual.Channel):  # type: ignore[misc]
    """A channel of kombu's: declares, publishes and consumes, over the bridge of its connection."""

    Message = _Message
    QoS = _QoS
    supports_fanout = True
    body_encoding = None
    from_transport_options = ()
    connection: Carrier
    closed: bool
    _qos: _QoS | None

    def __init__(self, connection: Carrier, **options: object) -> None:
        super().__init__(connection, **options)
        self.bridge: Bridge = connection.bridge
        self._exchanges = self.bridge.exchanges
        self._taking: Intake | None = None
        self._callbacks: dict[str, tuple[str, bool, Callable[[Any], object]]] = {}
        """By consumer tag: the queue, whether it is consumed without acknowledgement, and what to call."""
        self.receivers: dict[str, tuple[bool, Callable[[Any], object]]] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._acks: deque[Item] = deque()
        self._ack_posted = False
        self._paced = False
        """Celery has put a function of its own into the place of `QoS.can_consume`, to fetch only what can begin at once."""
        self._allowed = -1

    def __repr__(self) -> str:
        return f"<Channel {self.channel_id} of {self.bridge!r}>"

    # ------------------------------------------------------------------ publishing

    def basic_publish(
        self,
        message: dict[str, Any],
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **options: object,
    ) -> None:
        """Publish and return when the message is stored; a worker's event is not waited for.

        Raises:
            BrokerUnavailable, PublishUnknown, BufferFull: tried again by kombu, if it is told to.
            TooLarge: it is larger than the message system takes.
            NotFound: a task that its exchange gives to no queue.
        """
        bridge = self.bridge
        properties = message["properties"]
        exchange = exchange or ""
        routing_key = routing_key or ""
        properties["delivery_info"] = {"exchange": exchange, "routing_key": routing_key}
        frame = seal(message, exchange, self._type(exchange) if exchange else "direct", routing_key)
        limit = confirm_timeout or timeout or PUBLISH_TIMEOUT
        out = _collect.frames.get()
        if out is not None:
            out.append(_collect.Frame(bridge, self._exchanges.publish, (frame, limit)))
        elif exchange and _is_event(message):
            bridge.trail(frame, limit)
        else:
            bridge.call(self._exchanges.publish, frame, limit, timeout=limit + MORE)

    def _type(self, exchange: str) -> str:
        known = self.state.exchanges.get(exchange)
        return known["type"] if known is not None else "direct"

    def prepare_queue_arguments(self, arguments: Mapping[str, object], **options: object) -> Mapping[str, object]:
        """Turn the options of a kombu queue into arguments."""
        return cast("Mapping[str, object]", to_rabbitmq_queue_arguments(arguments, **options))

    # ------------------------------------------------------------------ declaring

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        nowait: bool = False,
        arguments: Mapping[str, object] | None = None,
        **options: object,
    ) -> queue_declare_ok_t:
        """Create *queue* where it is missing; with *passive* only ask for it."""
        name = queue or f"amq.gen-{uuid()}"
        if passive:
            if not self.bridge.call(self._exchanges.exists, name):
                raise ChannelError(
                    f"NOT_FOUND - no queue {name!r} in vhost {self.connection.client.virtual_host or '/'!r}",
                    (50, 10),
                    "Channel.queue_declare",
                    "404",
                )
            return queue_declare_ok_t(name, self._size(name), 0)
        count = self.bridge.call(self._declare, name, durable, exclusive, auto_delete, arguments or {})
        return queue_declare_ok_t(name, count, 0)

    async def _declare(
        self, queue: str, durable: bool, exclusive: bool, auto_delete: bool, arguments: Mapping[str, object]
    ) -> int:
        await self._exchanges.declare(
            queue, self.intake, durable=durable, exclusive=exclusive, auto_delete=auto_delete, arguments=arguments
        )
        try:
            return await self._exchanges.size(queue)
        except NotFound:  # somebody has deleted it since it was declared here
            await self._exchanges.restore(queue)
            return 0

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, object] | None = None,
        **options: object,
    ) -> None:
        """Bind *queue* to *exchange*; a transient queue gets what is published afterwards."""
        exchange = exchange or "amq.direct"
        routing_key = routing_key or ""
        # Whatever this connection has bound before: meanwhile the queue may have been deleted, by anybody, with its bindings.
        self.bridge.call(self._exchanges.bind, queue, exchange, self._type(exchange), routing_key)
        self.state.binding_declare(queue, exchange, routing_key, arguments)

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, object] | None = None,
        **options: object,
    ) -> None:
        """Take a binding back."""
        exchange = exchange or "amq.direct"
        routing_key = routing_key or ""
        self.bridge.call(self._exchanges.unbind, queue, exchange, routing_key)
        self.state.binding_delete(queue, exchange, routing_key)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **options: object) -> None:
        """Delete *queue* with its messages."""
        if if_empty and self._size(queue):
            return
        self.bridge.call(self._exchanges.delete, queue)
        self.state.queue_bindings_delete(queue)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Forget *exchange*, with its bindings."""
        for routing_key, _, queue in self.get_table(exchange):
            self.queue_unbind(queue, exchange, routing_key)
        self.bridge.call(self._exchanges.forget, exchange)
        self.state.exchanges.pop(exchange, None)

    def get_table(self, exchange: str) -> list[tuple[str, str | None, str]]:
        """Return the bindings of *exchange*: routing key, pattern and queue."""
        return self.bridge.call(self._exchanges.table, exchange)

    def list_bindings(self) -> Iterator[tuple[str, str, str]]:
        """Yield queue, exchange and routing key of all bindings of the exchanges declared here."""
        for exchange in list(self.state.exchanges):
            for routing_key, _, queue in self.get_table(exchange):
                yield queue, exchange, routing_key

    def _size(self, queue: str) -> int:
        return self.bridge.call(self._exchanges.size, queue)

    def _purge(self, queue: str) -> int:
        return self.bridge.call(self._exchanges.purge, queue)

    def _has_queue(self, queue: str, **options: object) -> bool:
        return self.bridge.call(self._exchanges.exists, queue)

    # ------------------------------------------------------------------ consuming

    @property
    def intake(self) -> Intake:
        """The asynchronous side, made when it is first needed: who only publishes has none."""
        taking = self._taking
        if taking is None:
            taking = self._taking = Intake(self._exchanges, self._deliver, self.connection.fail)
            if self._qos is not None:
                taking.prefetch(self._qos.prefetch_count or None)
        return taking

    def _deliver(self, items: Sequence[Item]) -> None:
        self.connection.deliver(self, items)

    @property
    def qos(self) -> _QoS:
        """What was handed out and is not settled."""
        qos = self._qos
        if qos is None:
            qos = self._qos = _QoS(self)
        return qos

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Say how many messages may be here unsettled; 0 for any number."""
        self.qos.prefetch_count = prefetch_count
        if not self._paced:
            self.bridge.post(self._prefetch, prefetch_count or None)

    def _prefetch(self, prefetch_count: int | None) -> None:
        self.intake.prefetch(prefetch_count)

    def pace(self) -> None:
        """Have one more message fetched if there is room for one now (``worker_disable_prefetch``)."""
        qos = self.qos
        allowed = len(qos.items) + bool(qos.can_consume())
        if allowed != self._allowed:
            self._allowed = allowed
            self.bridge.post(self._allow)

    def _allow(self) -> None:
        self.intake.prefetch(self._allowed)  # the newest, whichever thread has set it

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[[Any], object] | None = None,
        consumer_tag: str | None = None,
        **options: object,
    ) -> str:
        """Begin to consume *queue*; each message goes to *callback*, in the thread that drains events."""
        tag = consumer_tag or f"ctag{uuid()}"
        if callback is None:
            raise ValueError("basic_consume needs a callback")
        self._callbacks[tag] = (queue, no_ack, callback)
        self._tag_to_queue[tag] = queue
        self._active_queues.append(queue)
        self._consumers.add(tag)
        if not self._paced and "can_consume" in self.qos.__dict__:
            self._paced = True
            self.connection.pace(self)
            self.pace()
        first = queue not in self.receivers
        self.receivers[queue] = (no_ack, callback)
        if first:
            self.bridge.post(self._start, queue, no_ack)
        return tag

    def _start(self, queue: str, no_ack: bool) -> None:
        # Not waited for: several queues begin at once, and their messages are kept for them meanwhile.
        before = self._starting.get(queue)
        task = self._starting[queue] = asyncio.get_running_loop().create_task(self._consume(queue, no_ack, before))
        task.add_done_callback(lambda done: self._started(queue, done))

    async def _consume(self, queue: str, no_ack: bool, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self.intake.consume(queue, no_ack)

    def _started(self, queue: str, task: asyncio.Task[None]) -> None:
        if self._starting.get(queue) is task:
            del self._starting[queue]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.connection.fail(error)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Consume no more: what was fetched and not handed out goes back, and what was may still be settled."""
        before = self._callbacks.pop(consumer_tag, None)
        if before is None:
            return
        queue = before[0]
        self._consumers.discard(consumer_tag)
        self._tag_to_queue.pop(consumer_tag, None)
        if queue in self._active_queues:
            self._active_queues.remove(queue)
        for other, no_ack, callback in self._callbacks.values():
            if other == queue:
                self.receivers[queue] = (no_ack, callback)
                return
        self.receivers.pop(queue, None)
        self.bridge.call(self._cancel, queue, timeout=CLOSE_TIMEOUT)
        self._give_back(queue)

    async def _cancel(self, queue: str) -> None:
        starting = self._starting.pop(queue, None)
        if starting is not None:
            starting.cancel()
            await asyncio.wait([starting])
        await self.intake.cancel(queue)

    def _give_back(self, queue: str | None = None) -> None:
        """Release what was delivered here and not handed to a callback."""
        items = self.connection.take_back(self, queue)
        if items:
            self.bridge.post(self._release, items)

    def _release(self, items: list[Item]) -> None:
        self.intake.release(items)

    def hand_over(self, item: Item) -> bool:
        """Hand a delivered message to its consumer; False if it is gone."""
        receiver = self.receivers.get(item.queue)
        if receiver is None or (monotonic() > item.since + STALE and not self._still_ours(item)):
            self.bridge.post(self._release, [item])
            return False
        message = self._message(item)
        try:
            receiver[1](message)
        except Exception:
            if not _is_gossip(item):
                raise
            # Each worker hears all of them: what somebody sends wrongly would end all at once.
            logger.exception("queue %s: a message is dropped, which its reader cannot take", item.queue)
            if not item.no_ack:
                self.qos.reject(cast(str, message.delivery_tag))
        return True

    def _still_ours(self, item: Item) -> bool:
        """Tell whether *item*, which has waited here, is not somebody else's by now, as when this process stood still."""
        with suppress(BrokerError):  # else it goes back, too
            return item.feed is None or self.bridge.call(self._owns, item.feed, item)
        return False

    async def _owns(self, feed: Feed, item: Item) -> bool:
        await asyncio.sleep(0)  # what a driver has found to be lost it tells in the next turn of the loop
        return item.message is not None and feed.owns(item.message)

    def _message(self, item: Item) -> _Message:
        tag = str(next(_tags))
        payload = item.payload
        payload["properties"]["delivery_tag"] = tag
        if item.no_ack:
            self.acknowledge(item)
        else:
            self.qos.items[tag] = item
        return _Message(payload, self, tag)

    def basic_get(self, queue: str, no_ack: bool = False, **options: object) -> _Message | None:
        """Return the next message of *queue*, or None if there is none now."""
        item = self.bridge.call(self._get, queue, no_ack)
        return None if item is None else self._message(item)

    async def _get(self, queue: str, no_ack: bool) -> Item | None:
        return await self.intake.get(queue, no_ack)

    # ------------------------------------------------------------------ settling

    def acknowledge(self, item: Item) -> None:
        """Have *item* acknowledged, with all others of the same turn of the loop."""
        if self._paced:
            self.pace()  # before it makes room for another one
        self._acks.append(item)
        if not self._ack_posted:
            try:
                self._ack_posted = True
                self.bridge.post(self._send_acks)
            except BaseException:  # a soft time limit may interrupt anything
                self._ack_posted = False
                raise

    def _send_acks(self) -> None:
        self._ack_posted = False  # before: what comes from now on posts again
        acks = self._acks
        items = [acks.popleft() for _ in range(len(acks))]
        if items:
            self.intake.ack(items)

    def refuse(self, items: list[Item], requeue: bool) -> None:
        """Have *items* put back, or put to the dead letters."""
        self.bridge.post(self._refuse, items, requeue)

    def _refuse(self, items: list[Item], requeue: bool) -> None:
        if requeue:
            self.intake.requeue(items)
        else:
            self.intake.reject(items)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Close: what was acknowledged is stored, and what is unsettled goes back to its queues."""
        if self.closed:
            return
        self.closed = True
        connection = self.connection
        try:
            self._callbacks.clear()
            self._consumers.clear()
            self._tag_to_queue.clear()
            self._active_queues.clear()
            self.receivers.clear()
            if self._taking is not None:
                self._give_back()
                with suppress(Closed):  # with its broker, which gave everything back
                    self.bridge.call(self._close, timeout=CLOSE_TIMEOUT)
        finally:
            if self._qos is not None:
                self._qos.items.clear()
            self.exchange_types = None
            connection.close_channel(self)

    async def _close(self) -> None:
        starting = list(self._starting.values())
        self._starting.clear()
        for task in starting:
            task.cancel()
        if starting:
            await asyncio.wait(starting)
        self._send_acks()
        await self.intake.close()

    def abandon(self) -> None:
        """Forget everything without a word to the broker: this process was forked from the channel's."""
        self.closed = True
        if self._qos is not None:
            self._qos.items.clear()
        self._acks.clear()
        self.connection = cast(Carrier, None)

    def _get_free_channel_id(self) -> int:
        return self.connection.next_channel_id()


def _is_gossip(item: Item) -> bool:
    """Tell whether *item* is an event that a worker reads."""
    return item.queue.startswith(EVENTS_PREFIX) and "celery.worker.consumer.consumer" in sys.modules


def _is_event(message: Mapping[str, Any]) -> bool:
    """Tell whether *message* is what Celery's event dispatcher sends: its worker must not stand still for it."""
    return message["properties"].get("delivery_mode") == 1 and list(message["headers"]) == ["hostname"]
