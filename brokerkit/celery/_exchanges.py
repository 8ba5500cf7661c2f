"""Where a message of Celery goes: durable queues are brokerkit's, transient ones read the topics of their exchanges."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from ..address import Queue
from ..broker import Broker
from ..errors import BrokerUnavailable, NotFound, TooLarge
from ..message import Message
from ..policy import MAX_BODY, MAX_DELAY, seconds
from ._bindings import Binding, Bindings, pattern_of
from ._envelope import Frame, wait
from ._mailboxes import EXPIRES, PRIORITY, ROUTING_KEY, Mailbox, Mailboxes
from ._mailboxes import Binding as BoxBinding
from ._names import Names
from ._revokes import Revokes, is_control

logger = logging.getLogger("brokerkit")

LEASE: Final = 15.0
ETA_WINDOW: Final = 60.0
MOST: Final = MAX_BODY - 256
"""Bytes of a task: its copies, which are marked, must fit as well."""
KNOWN: Final = 10_000
"""Names of queues of which is kept in mind whether they exist."""
MISSING: Final = 1.0
THERE: Final = 60.0
"""Seconds for which that is believed."""
_OID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Names of the queues of ``rpc://``: the id of who waits for results."""
EVENTS_PREFIX: Final = "celeryev."
_NAMED_ONLY: Final = (EVENTS_PREFIX, "bcast.")
UNROUTED: Final = 1000
"""Exchanges and keys that were warned about."""


class Exchanges:
    """The exchanges and queues of one broker, as one process uses them.  All of it runs in the broker's event loop."""

    def __init__(self, broker: Broker, system: str, settings: Mapping[str, object]) -> None:
        lease = seconds("lease", _number(settings.get("lease", LEASE)), low=1, high=86400)
        self.broker = broker
        self.eta_window: float = seconds("eta_window", _number(settings.get("eta_window", ETA_WINDOW)))
        """Seconds before a task is due in which the broker hands it to a worker."""
        self.names: Names = Names(priorities=1 if system == "kafka" else 10, lease=lease)
        self.revokes: Revokes = Revokes(broker, self.names)
        self.boxes: Mailboxes = Mailboxes(broker, self.names, self._heard)
        self._bindings = Bindings(broker, self.names)
        self._durable: set[str] = set()
        """What was declared in this process, and what was consumed."""
        self._undecided: dict[str, tuple[object, bool]] = {}
        """Queues that their binding makes transient, or their use durable: who declared each, and whether as durable."""
        self._known: dict[str, tuple[bool, float]] = {}
        self._ttls: dict[str, float] = {}
        """The ``x-message-ttl`` of queues, in seconds."""
        self._told = False
        self._unrouted: set[tuple[str, str]] = set()
        """Exchanges and routing keys without a queue that were warned about."""

    def __repr__(self) -> str:
        return f"<Exchanges {self.broker!r}>"

    async def close(self) -> None:
        """End what is read here.  The broker stays open."""
        try:
            await self.boxes.close()
        finally:
            await self._bindings.close()

    # ------------------------------------------------------------------ declaring

    async def declare(
        self,
        queue: str,
        owner: object,
        *,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, object] | None = None,
    ) -> None:
        """Declare *queue*; a transient one takes what is published from now on, for as long as *owner* keeps it.

        Transient is what is exclusive, and what is deleted with its last reader and is bound to a fanout exchange, or expires
        and is not durable; and what Celery itself declares for one process, durable or not.  Everything else several processes may read, so it
        is a queue of the broker and is never deleted by itself.
        """
        own = is_control(queue) or queue.startswith(_NAMED_ONLY)
        alone = not durable or own or _OID.fullmatch(queue) is not None
        box = self.boxes.get(queue)
        ttl = _milliseconds((arguments or {}).get("x-message-ttl"))
        if ttl is not None:
            self._ttls[queue] = ttl
        if box is not None:
            box.owners.add(owner)
        elif queue in self._durable:
            return
        elif exclusive or (auto_delete and arguments and "x-expires" in arguments and alone):
            box = self.boxes.declare(queue, owner, auto_delete=auto_delete, ttl=ttl)
            if not own:
                await self.boxes.bind(box, "", BoxBinding("direct", queue))
        elif auto_delete:
            self._undecided.setdefault(queue, (owner, durable))
        else:
            await self._make(queue)

    async def bind(self, queue: str, exchange: str, type: str, routing_key: str) -> None:
        """Bind *queue*; return when what is published to *exchange* from now on, by anybody, comes to it."""
        if not exchange:
            return
        undecided = self._undecided.get(queue)
        box = self.boxes.get(queue)
        if undecided is not None and box is None:
            owner, durable = undecided
            if type == "fanout" or (not durable and (type == "topic" or is_control(exchange))):
                del self._undecided[queue]
                box = self.boxes.declare(queue, owner, auto_delete=True, ttl=self._ttls.get(queue))
        if box is None:
            await self._make(queue)
            await self._bindings.bind(Binding(exchange, type, routing_key, queue))
            return
        await self.boxes.bind(box, exchange, BoxBinding(type, routing_key))
        if not (
            is_control(exchange) or queue.startswith(EVENTS_PREFIX)
        ):  # whoever sends there does not ask who listens
            await self._bindings.listen(exchange, type)
        if type == "fanout" and is_control(exchange):
            self.revokes.serve(queue)

    async def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Take the binding of *queue* to *exchange* back."""
        box = self.boxes.get(queue)
        if box is not None:
            self.boxes.unbind(box, exchange, routing_key)
        elif exchange:
            await self._bindings.unbind(exchange, routing_key, queue)

    async def forget(self, exchange: str) -> None:
        """Forget who listens to *exchange*, which is deleted."""
        if exchange and not is_control(exchange):
            await self._bindings.unbind(exchange, "", "")

    async def delete(self, queue: str) -> None:
        """Remove *queue* with what is in it and its bindings."""
        if self.boxes.get(queue) is not None:
            self.boxes.remove(queue)
        elif self._undecided.pop(queue, None) is None:
            if queue not in self._durable and not await self.broker.exists(self.names.queue(queue)):
                return  # such as the queue of a reply, which has ended with its reader
            await self._bindings.drop(queue)
            self._durable.discard(queue)
            self._known.pop(queue, None)
            self._ttls.pop(queue, None)
            await self.broker.delete(self.names.queue(queue))

    async def resolve(self, queue: str) -> Mailbox | Queue[bytes]:
        """Return what *queue* is, to be read."""
        box = self.boxes.get(queue)
        if box is None:
            await self._make(queue)
            return self.names.queue(queue)
        if not box.bound:
            await self.boxes.bind(box, "", BoxBinding("direct", queue))
        return box

    async def restore(self, queue: str) -> None:
        """Create *queue* anew, which was there and has vanished."""
        await self.broker.declare(self.names.queue(queue))

    async def _make(self, queue: str) -> None:
        if queue not in self._durable:
            await self.broker.bind(self.names.queue(queue))
            self._undecided.pop(queue, None)
            self._known.pop(queue, None)
            self._durable.add(queue)

    # ------------------------------------------------------------------ asking

    def keeps(self, queue: str) -> bool:
        """Tell whether *queue* was declared here as one of the broker, and not deleted here."""
        return queue in self._durable

    async def exists(self, queue: str) -> bool:
        """Return whether *queue* is there."""
        if self.boxes.get(queue) is not None or queue in self._undecided:
            return True
        return await self.broker.exists(self.names.queue(queue))

    async def size(self, queue: str) -> int:
        """Return how many messages of *queue* wait to be taken."""
        box = self.boxes.get(queue)
        if box is not None:
            return len(box)
        if queue not in self._durable and not await self.broker.exists(self.names.queue(queue)):
            return 0
        return (await self.broker.backlog(self.names.queue(queue))).waiting or 0

    async def purge(self, queue: str) -> int:
        """Remove what waits in *queue* and return how many messages that were."""
        box = self.boxes.get(queue)
        if box is not None:
            return box.clear()
        if queue not in self._durable and not await self.broker.exists(self.names.queue(queue)):
            return 0
        return await self.broker.purge(self.names.queue(queue))

    async def table(self, exchange: str) -> list[tuple[str, str | None, str]]:
        """Return what is bound to *exchange*: routing key, Kombu's pattern of it, and queue."""
        await self._bindings.ready()
        durable = [
            (b.routing_key, pattern_of(b.type, b.routing_key), b.queue) for b in self._bindings.of_exchange(exchange)
        ]
        here = [
            (b.routing_key, pattern_of(b.type, b.routing_key), queue) for b, queue in self.boxes.of_exchange(exchange)
        ]
        return durable + here

    # ------------------------------------------------------------------ publishing

    async def publish(self, frame: Frame, timeout: float = 30) -> None:
        """Publish *frame*; return when it is stored wherever it goes.

        To the default exchange: in the queue that the routing key names, unless that is a transient one of any process, which
        gets it through the exchange's topic.  A task always goes to a queue of the broker, or to whoever listens to a fanout.

        Raises:
            NotFound: a task, which its exchange gives to no queue.
            BrokerError: it is not stored everywhere.
        """
        exchange, key = frame.exchange, frame.routing_key
        if not exchange:
            if key in self._durable or await self._stays(key, frame):
                await self._store(key, frame, timeout)
            else:
                await self._spread(frame, timeout)
            return
        if not self._bindings.follows:
            await self._in_time(self._bindings.ready(), exchange, timeout)
        control = is_control(exchange)
        if control:
            await self.revokes.note(frame.body, timeout)
        queues = self._bindings.route(exchange, key)
        if not queues and not control and (frame.task or frame.lasting):
            queues = await self._look(frame, timeout)
        if not queues:
            await self._spread(frame, timeout)
            return
        stores: list[Coroutine[Any, Any, None]] = [self._store(queue, frame, timeout) for queue in queues]
        results = await asyncio.gather(*stores, self._spread(frame, timeout), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    async def _in_time(self, reading: Coroutine[Any, Any, None], exchange: str, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await reading
        except TimeoutError as error:
            text = f"the bindings of exchange {exchange!r} could not be read within {timeout:g} s: nothing is published"
            raise BrokerUnavailable(text) from error

    async def _look(self, frame: Frame, timeout: float) -> tuple[str, ...]:
        """Return the queues of *frame*, for which there are none by what is known; see to it that this is not silent."""
        exchange, key = frame.exchange, frame.routing_key
        listened = self._bindings.listened(exchange)
        told = (exchange, key) in self._unrouted
        if listened == "fanout" or (listened and not frame.task):
            return ()
        if told and (listened or frame.type == "fanout" or not frame.task):
            return ()
        await self._in_time(self._bindings.look(), exchange, timeout)
        queues = self._bindings.route(exchange, key)
        listened = self._bindings.listened(exchange)
        if queues or listened == "fanout":
            return queues
        lost = f"no queue is bound to exchange {exchange!r} with the routing key {key!r}"
        if frame.task and listened is None and frame.type != "fanout":
            raise NotFound(f"{lost}: the task is not published")
        if not told and (frame.task or not listened):
            if len(self._unrouted) >= UNROUTED:
                self._unrouted.clear()
            self._unrouted.add((exchange, key))
            logger.warning("%s: what is published there is dropped, unless a transient queue takes it", lost)
        return ()

    async def _store(self, name: str, frame: Frame, timeout: float) -> None:
        """Publish *frame* to the durable queue *name*."""
        queue = self.names.queue(name)
        if len(frame.body) > MOST:
            raise TooLarge(f"a message of {len(frame.body)} bytes for {queue!r}: at most {MOST} are allowed")
        priority, ttl = frame.priority, frame.ttl
        if self._ttls and not frame.task and name in self._ttls:
            ttl = self._ttls[name] if ttl is None else min(ttl, self._ttls[name])
        if priority >= self.names.priorities:
            if not self._told and self.names.priorities == 1:
                self._told = True
                logger.warning("%r: this broker serves no priorities: messages are taken in their order", queue)
            priority = self.names.priorities - 1
        delay = 0.0
        if frame.eta is not None:
            delay = min(wait(frame.eta, self.eta_window), MAX_DELAY)
        if delay or priority or ttl is not None:
            await self.broker.publish(queue, frame.body, delay=delay, priority=priority, ttl=ttl, timeout=timeout)
        else:
            await self.broker.publish(queue, frame.body, timeout=timeout)

    async def _spread(self, frame: Frame, timeout: float) -> None:
        """Publish *frame* to the topic of its exchange, for transient queues anywhere."""
        headers: dict[str, str] = {}
        if frame.routing_key:
            headers[ROUTING_KEY] = frame.routing_key
        if frame.priority:
            headers[PRIORITY] = str(frame.priority)
        if frame.ttl is not None:
            headers[EXPIRES] = repr(time.time() + frame.ttl)
        topic = self.names.exchange(frame.exchange)
        await self.broker.publish(topic, frame.body, headers=headers, timeout=timeout)

    async def _stays(self, queue: str, frame: Frame) -> bool:
        """Return whether what is published to *queue* by its name is kept in a queue of the broker."""
        if self.boxes.get(queue) is not None:
            return False
        if queue in self._undecided or frame.task:
            await self._make(queue)
            return True
        known = self._known.get(queue)
        now = time.monotonic()
        # What is to be kept is not lost because somebody has declared the queue a moment ago.
        if known is None or now >= known[1] or (frame.lasting and not known[0]):
            there = await self.broker.exists(self.names.queue(queue))
            if len(self._known) >= KNOWN:
                self._known.clear()
            known = self._known[queue] = (there, now + (THERE if there else MISSING))
        return known[0]

    def _heard(self, exchange: str, message: Message[bytes]) -> None:
        if self.revokes.serving and is_control(exchange):
            self.revokes.heard(message.body, message.timestamp.timestamp())


def _milliseconds(value: object) -> float | None:
    """Return *value*, an argument of a queue in milliseconds, in seconds."""
    return max(value / 1000, 0.001) if isinstance(value, (int, float)) else None


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        return float(str(value))
    except ValueError:
        return float("nan")  # refused by name, as what is out of range
