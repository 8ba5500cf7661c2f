"""Which durable queues are bound to which exchanges: kept in the broker, so that publishers elsewhere route as well."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from kombu.transport.virtual.exchange import TopicExchange

from ..broker import Broker
from ..message import Message
from ._follower import Follower
from ._names import Names

logger = logging.getLogger("brokerkit")

ROUTES: Final = 10_000
"""Routing keys whose queues are kept at hand."""
FRESH: Final = 1.0
"""Seconds for which what was read and is not followed is believed."""
READINGS: Final = 3
"""How often all is read where something changes meanwhile."""
_topic_exchange: Any = TopicExchange(None)


class Binding(msgspec.Struct, frozen=True):
    """A queue is bound to an exchange of *type* with a key, which for topics is a pattern.

    Without a *queue* it says that transient queues read the exchange.
    """

    exchange: str
    type: str
    routing_key: str
    queue: str


class _Note(msgspec.Struct):
    """One record of the topic of bindings."""

    exchange: str
    type: str
    routing_key: str
    queue: str
    pattern: str | None = None
    bound: bool = True


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Note).decode


def pattern_of(type: str, routing_key: str) -> str | None:
    """Return Kombu's regular expression for *routing_key* of a topic exchange, None for other types."""
    return str(_topic_exchange.key_to_pattern(routing_key)) if type == "topic" else None


def matches(type: str, key: str, routing_key: str) -> bool:
    """Return whether what is published with *routing_key* goes to what is bound with *key*, as Kombu decides it."""
    if type == "fanout":
        return True
    if type == "topic":
        return _topic_exchange._match(_topic_exchange.key_to_pattern(key), routing_key) is not None
    return key == routing_key


class Bindings:
    """The bindings of all durable queues: read as a whole once, then followed."""

    def __init__(self, broker: Broker, names: Names) -> None:
        self._broker = broker
        self._names = names
        self._lock = asyncio.Lock()
        self._follower: Follower | None = None
        self._bound: dict[str, set[Binding]] = defaultdict(set)
        """By exchange."""
        self._seen: set[Binding] = set()
        """What the broker has, as far as is known."""
        self._readings: set[_Reading] = set()
        self._following = _Reading(self)
        self._mine: set[Binding] = set()
        """What this process has bound: it is stored again if it gets lost."""
        self._routes: dict[tuple[str, str], tuple[str, ...]] = {}
        self._read_at = -math.inf
        self._heard = 0
        """Records that came while they were followed."""

    # ------------------------------------------------------------------ asking

    @property
    def follows(self) -> bool:
        """Whether all bindings that were stored before are known, and later ones come by themselves."""
        return self._follower is not None and self._follower.follows

    async def ready(self) -> None:
        """Return when all bindings that were stored before are known."""
        if not self.follows:
            async with self._lock:
                if not self.follows:
                    follower = self._follow(self._following)
                    await follower.open()
                    self._follower = follower

    async def _read(self, fresh: float = FRESH) -> None:
        """Return when all bindings are known, for now: who only binds its queues, as Celery's producers do, follows nothing.

        What was read less than *fresh* seconds ago is believed.
        """
        if self._follower is not None and self._follower.current:
            return
        asked = time.monotonic()
        async with self._lock:
            if self._read_at < asked and time.monotonic() >= self._read_at + fresh:
                await self._read_all()

    async def _read_all(self) -> None:
        reading = _Reading(self)
        try:
            for _ in range(READINGS):
                self._read_at, heard = time.monotonic(), self._heard
                reading.begin()
                await self._follow(reading).read_stored()
                if heard == self._heard:  # else the follower may know better
                    break
            reading.end()
        except BaseException:
            self._read_at = -math.inf
            raise
        finally:
            self._readings.discard(reading)

    def _follow(self, reading: _Reading) -> Follower:
        async def read() -> None:
            reading.end()
            await self._restore()

        return Follower(self._broker, self._names.bindings, reading.take, begin=reading.begin, read=read)

    def route(self, exchange: str, routing_key: str) -> tuple[str, ...]:
        """Return the queues to which *exchange* gives what is published with *routing_key*.  After `ready`."""
        known = self._routes.get((exchange, routing_key))
        if known is None:
            bound = self._bound.get(exchange, ())
            known = tuple(sorted({b.queue for b in bound if b.queue and matches(b.type, b.routing_key, routing_key)}))
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            self._routes[exchange, routing_key] = known
        return known

    def of_exchange(self, exchange: str) -> list[Binding]:
        """Return what is bound to *exchange*.  After `ready`."""
        return [binding for binding in self._bound.get(exchange, ()) if binding.queue]

    def listened(self, exchange: str) -> str | None:
        """Return the type of *exchange* if transient queues read it, or have read it.  After `ready`."""
        return next((binding.type for binding in self._bound.get(exchange, ()) if not binding.queue), None)

    async def look(self) -> None:
        """Return when all bindings that were stored before are known for certain, those too that came just now."""
        async with self._lock:
            await self._read_all()

    # ------------------------------------------------------------------ changing

    async def bind(self, binding: Binding) -> None:
        """Keep *binding*; return when everybody can know of it."""
        if binding in self._mine:
            # Bound again, as somebody may have deleted its queue meanwhile: that is looked up, and followed from now on.
            await self.ready()
            await self._read(0.0)
        else:
            await self._read()
        self._mine.add(binding)
        if binding not in self._seen:
            await self._store(binding, bound=True)

    async def listen(self, exchange: str, type: str) -> None:
        """Keep that transient queues read *exchange*, of which who publishes there would not know."""
        binding = Binding(exchange, type, "", "")
        if binding not in self._mine:
            await self.bind(binding)

    async def unbind(self, exchange: str, routing_key: str, queue: str) -> None:
        """Forget the binding of *queue* to *exchange* with *routing_key*."""
        await self._read(0.0)
        for binding in list(self._bound.get(exchange, ())):
            if (binding.routing_key, binding.queue) == (routing_key, queue):
                await self._store(binding, bound=False)

    async def drop(self, queue: str) -> None:
        """Forget all bindings of *queue*, which is deleted."""
        await self._read(0.0)
        for exchange in list(self._bound):
            for binding in self.of_exchange(exchange):
                if binding.queue == queue:
                    await self._store(binding, bound=False)

    async def close(self) -> None:
        """Follow no more."""
        if self._follower is not None:
            await self._follower.close()

    async def _store(self, binding: Binding, *, bound: bool) -> None:
        if not bound:
            self._mine.discard(binding)
        pattern = pattern_of(binding.type, binding.routing_key)
        note = _Note(binding.exchange, binding.type, binding.routing_key, binding.queue, pattern, bound)
        await self._broker.publish(self._names.bindings, _encode(note))
        self._apply(note)
        for reading in self._readings:
            reading.stored(note)

    # ------------------------------------------------------------------ following

    def _apply(self, note: _Note) -> None:
        bound = self._bound[note.exchange]
        # Whatever type it was bound with before: the last record counts.
        before = {b for b in bound if (b.routing_key, b.queue) == (note.routing_key, note.queue)}
        bound -= before
        self._seen -= before
        if note.bound:
            binding = Binding(note.exchange, note.type, note.routing_key, note.queue)
            bound.add(binding)
            self._seen.add(binding)
        else:
            self._mine -= before  # whoever has unbound it did mean it
            if not bound:
                del self._bound[note.exchange]
        self._routes.clear()

    async def _restore(self) -> None:
        for binding in self._mine - self._seen:
            await self._store(binding, bound=True)


class _Reading:
    """One pass through all that is stored, which counts when it has ended: until then what was known stays.

    So nothing is without a queue only because an older record, which said so, is read once more.
    """

    def __init__(self, bindings: Bindings) -> None:
        self._bindings = bindings
        self._notes: dict[tuple[str, str, str], _Note] | None = None
        """The last record of each binding, while it reads."""
        self._own: dict[tuple[str, str, str], _Note] = {}
        """What this process has stored meanwhile, which may come behind the end."""

    def begin(self) -> None:
        """Begin to read all over again."""
        self._notes, self._own = {}, {}
        self._bindings._readings.add(self)

    def take(self, messages: Sequence[Message[bytes]]) -> None:
        """Learn from *messages*, at once or at the end."""
        for message in messages:
            try:
                note = _decode(message.body)
            except msgspec.DecodeError:
                logger.warning("%s: %s is no binding", self._bindings._names.bindings.name, message.position)
                continue
            if self._notes is None:
                self._bindings._heard += 1
                self._bindings._apply(note)
            else:
                self._notes[_key(note)] = note

    def stored(self, note: _Note) -> None:
        """Note what this process has stored meanwhile."""
        self._own[_key(note)] = note

    def end(self) -> None:
        """Let what was read count."""
        bindings, notes = self._bindings, self._notes or {}
        bindings._readings.discard(self)
        self._notes = None
        bindings._seen.clear()
        for note in (notes | self._own).values():
            bindings._apply(note)


def _key(note: _Note) -> tuple[str, str, str]:
    return note.exchange, note.routing_key, note.queue
