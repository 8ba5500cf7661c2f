"""Queues that end with who reads them: replies, events and broadcasts are read from the topics of their exchanges."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from ..broker import Broker
from ..message import Message
from ._bindings import matches
from ._follower import Follower
from ._names import Names

logger = logging.getLogger("brokerkit")

ROUTING_KEY: Final = "celery-routing-key"
PRIORITY: Final = "celery-priority"
EXPIRES: Final = "celery-expires"
"""Headers that say how a message of an exchange was published; the last one is a time in seconds since the epoch."""
MOST: Final = 10_000
"""Messages that a queue without a reader keeps; then the oldest is dropped."""
LINGER: Final = 10.0
"""Seconds for which an exchange that nobody reads any more is read on: clients of the remote control come again and again."""


Heard: TypeAlias = Callable[[str, Message[bytes]], None]


class Binding(NamedTuple):
    """How a mailbox is bound to one exchange."""

    type: str
    routing_key: str


class Mailbox:
    """A queue in this process."""

    def __init__(self, name: str, *, auto_delete: bool, ttl: float | None = None) -> None:
        self.name = name
        self.auto_delete = auto_delete
        self._ttl = ttl
        self._levels: dict[int, deque[tuple[bytes, float]]] = {}
        """By priority: what waits, and until when."""
        self._count = 0
        self.owners: set[object] = set()
        """The channels that have declared it: it ends with the last of them."""
        self.readers: deque[Callable[[Mailbox], None]] = deque()
        """Who is told that something waits, in turn."""
        self.bound: dict[str, set[Binding]] = defaultdict(set)
        """By exchange."""
        self._dropped = 0

    def __repr__(self) -> str:
        return f"<Mailbox {self.name} waiting={self._count}>"

    def __len__(self) -> int:
        """How many messages wait."""
        self._expire()
        return self._count

    def __bool__(self) -> bool:
        return True

    def put(self, body: bytes, priority: int = 0, until: float = math.inf) -> None:
        """Keep *body* for the readers, *until* that time at most; what has a higher *priority* is taken first."""
        if self._count >= MOST:
            self._drop()
        if self._ttl is not None:
            until = min(until, time.time() + self._ttl)
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = deque()
        level.append((body, until))
        self._count += 1

    def put_back(self, body: bytes, priority: int = 0) -> None:
        """Keep *body*, which was taken before, for whoever comes first."""
        self._levels.setdefault(priority, deque()).appendleft((body, math.inf))
        self._count += 1

    def take(self) -> bytes | None:
        """Return what is next, or None if nothing waits."""
        while self._count:
            level = self._levels[max(self._levels)] if len(self._levels) > 1 else next(iter(self._levels.values()))
            body, until = level.popleft()
            self._removed(level)
            if until is math.inf or time.time() < until:
                return body
        return None

    def clear(self) -> int:
        """Drop what waits and return how much that was."""
        count = len(self)
        self._levels.clear()
        self._count = 0
        return count

    def _drop(self) -> None:
        level = self._levels[min(self._levels)]
        level.popleft()
        self._removed(level)
        self._dropped += 1
        if self._dropped == 1 or self._dropped % MOST == 0:
            text = "queue %s: nobody reads it, so the oldest of more than %d messages are dropped (%d so far)"
            logger.warning(text, self.name, MOST, self._dropped)

    def _removed(self, level: deque[tuple[bytes, float]]) -> None:
        self._count -= 1
        if not level:
            self._levels = {priority: other for priority, other in self._levels.items() if other}

    def _expire(self) -> None:
        now = time.time()
        for level in list(self._levels.values()):
            while level and level[0][1] <= now:
                level.popleft()
                self._removed(level)

    def ring(self) -> None:
        """Let the readers take what waits."""
        for _ in range(len(self.readers)):
            if not self._count:
                return
            self.readers.rotate(-1)
            self.readers[-1](self)


class Tap:
    """Reads the topic of one exchange for all mailboxes of this process that are bound to it."""

    def __init__(self, broker: Broker, names: Names, exchange: str, heard: Heard) -> None:
        self.boxes: set[Mailbox] = set()
        self.users = 0
        """Calls that are about to bind a mailbox here."""
        self.idle: asyncio.TimerHandle | None = None
        self.opening = asyncio.Lock()
        self.follower = Follower(broker, names.exchange(exchange), self._take)
        self._exchange = exchange
        self._heard = heard
        self._routes: dict[str, tuple[Mailbox, ...]] = {}

    def changed(self) -> None:
        """Forget where messages go."""
        self._routes.clear()

    def _take(self, messages: Sequence[Message[bytes]]) -> None:
        routes, rung = self._routes, dict[Mailbox, None]()
        for message in messages:
            key = message.headers.get(ROUTING_KEY, "")
            boxes = routes.get(key)
            if boxes is None:
                boxes = self._route(key)
            if boxes:
                body = message.body
                self._heard(self._exchange, message)
                priority, until = _options(message.headers)
                for box in boxes:
                    box.put(body, priority, until)
                    rung[box] = None
        for box in rung:
            box.ring()

    def _route(self, key: str) -> tuple[Mailbox, ...]:
        if len(self._routes) >= MOST:
            self._routes.clear()
        exchange = self._exchange
        boxes = tuple(
            box for box in self.boxes if any(matches(b.type, b.routing_key, key) for b in box.bound.get(exchange, ()))
        )
        self._routes[key] = boxes
        return boxes


def _options(headers: Mapping[str, str]) -> tuple[int, float]:
    """Return the priority and the end of a message with *headers*."""
    if PRIORITY not in headers and EXPIRES not in headers:
        return 0, math.inf
    try:
        return int(headers.get(PRIORITY, "0")), float(headers.get(EXPIRES, "inf"))
    except ValueError:
        return 0, math.inf


class Mailboxes:
    """The mailboxes of this process, and the readers of their exchanges."""

    def __init__(self, broker: Broker, names: Names, heard: Heard) -> None:
        """*heard* is told of each message that comes, and of its exchange."""
        self._broker = broker
        self._names = names
        self._heard = heard
        self._boxes: dict[str, Mailbox] = {}
        self._taps: dict[str, Tap] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, name: str) -> Mailbox | None:
        """Return the mailbox *name*, if there is one in this process."""
        return self._boxes.get(name)

    def of_exchange(self, exchange: str) -> list[tuple[Binding, str]]:
        """Return what is bound to *exchange* here."""
        return [(binding, box.name) for box in self._boxes.values() for binding in box.bound.get(exchange, ())]

    def declare(self, name: str, owner: object, *, auto_delete: bool, ttl: float | None = None) -> Mailbox:
        """Return the mailbox *name*, which *owner* keeps; after *ttl* seconds messages are dropped."""
        box = self._boxes.get(name)
        if box is None:
            box = self._boxes[name] = Mailbox(name, auto_delete=auto_delete, ttl=ttl)
        box.owners.add(owner)
        return box

    async def bind(self, box: Mailbox, exchange: str, binding: Binding) -> None:
        """Bind *box*; return when whatever is published from now on comes to it."""
        if binding in box.bound.get(exchange, ()):
            return
        tap = await self._tap(exchange)
        try:
            if self._boxes.get(box.name) is box:
                box.bound[exchange].add(binding)
                tap.boxes.add(box)
                tap.changed()
        finally:
            tap.users -= 1
            self._look(exchange, tap)

    async def _tap(self, exchange: str) -> Tap:
        """Return the one reader of *exchange*, which reads, with one user more."""
        while True:
            tap = self._taps.get(exchange)
            if tap is None:
                tap = self._taps[exchange] = Tap(self._broker, self._names, exchange, self._heard)
            tap.users += 1
            try:
                async with tap.opening:
                    if tap.follower.follows:
                        return tap
                    if self._taps.get(exchange) is tap:
                        try:
                            await tap.follower.open()
                        except BaseException:
                            if self._taps.get(exchange) is tap:
                                del self._taps[exchange]  # a follower is opened once
                            raise
                        return tap
                tap.users -= 1  # whoever opened it has failed
            except BaseException:
                tap.users -= 1
                self._look(exchange, tap)
                raise

    def unbind(self, box: Mailbox, exchange: str, routing_key: str) -> None:
        """Take a binding of *box* back."""
        bound = box.bound.get(exchange)
        if not bound:
            return
        bound -= {binding for binding in bound if binding.routing_key == routing_key}
        if not bound:
            del box.bound[exchange]
        self._left(exchange, box)

    def remove(self, name: str) -> None:
        """End the mailbox *name*, if there is one."""
        box = self._boxes.pop(name, None)
        if box is not None:
            exchanges = list(box.bound)
            box.bound.clear()
            box.clear()
            box.readers.clear()
            for exchange in exchanges:
                self._left(exchange, box)

    def release(self, owner: object) -> None:
        """End the mailboxes that only *owner* has kept: its channel is closed."""
        for box in list(self._boxes.values()):
            if owner in box.owners:
                box.owners.discard(owner)
                if not box.owners:
                    self.remove(box.name)

    async def close(self) -> None:
        """End all of them."""
        for name in list(self._boxes):
            self.remove(name)
        taps, self._taps = self._taps, {}
        for tap in taps.values():
            if tap.idle is not None:
                tap.idle.cancel()
            self._end(tap)
        while self._closing:
            await asyncio.wait(self._closing)

    def _left(self, exchange: str, box: Mailbox) -> None:
        tap = self._taps.get(exchange)
        if tap is not None:
            if exchange not in box.bound:
                tap.boxes.discard(box)
            tap.changed()
            self._look(exchange, tap)

    def _look(self, exchange: str, tap: Tap) -> None:
        """Let *tap* be closed when nobody has used it for a while."""
        if tap.idle is not None:
            tap.idle.cancel()
            tap.idle = None
        if not tap.boxes and not tap.users and self._taps.get(exchange) is tap:
            tap.idle = asyncio.get_running_loop().call_later(LINGER, self._idle, exchange, tap)

    def _idle(self, exchange: str, tap: Tap) -> None:
        tap.idle = None
        if not tap.boxes and not tap.users and self._taps.get(exchange) is tap:
            del self._taps[exchange]
            self._end(tap)

    def _end(self, tap: Tap) -> None:
        task = asyncio.get_running_loop().create_task(tap.follower.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
