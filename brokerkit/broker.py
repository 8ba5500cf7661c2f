"""A connection to a message system: everything that is done with messages begins here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Literal, overload

from msgspec import structs
from typing_extensions import TypeVar

from ._binding import Bound, Declare
from ._letters import Pages, RedriveReport, redrive
from ._plans import queue_plans, topic_plans
from ._publisher import Publisher
from ._subscription import Subscription
from .address import Address, AnyQueue, AnyTopic, DeadLetters, Queue, Topic, check_name, redrive_queue
from .driver import Backlog, Health, Source, StoredRecord
from .errors import ConfigError, NotFound
from .events import Listener
from .message import Letter, Stored
from .middleware import Middleware
from .policy import Start, whole

T = TypeVar("T")


def connect(
    url: str,
    *,
    options: Mapping[str, object] = {},  # never changed
    declare: Declare = "auto",
    middleware: Sequence[Middleware] = (),
    on_event: Listener | None = None,
) -> Broker:
    """Return a broker for *url*, to be entered with ``async with``.  No I/O before that.

    URLs are ``memory://[name]``, ``redis://host:6379/0`` and ``kafka://host:9092``, with TLS ``rediss://`` and ``kafka+ssl://``;
    every option of the query may stand in *options* too, by the same name.  *declare* says what happens with an address on
    its first use: ``"auto"`` creates what is missing and never alters, ``"check"`` raises `NotFound` or `SettingsMismatch`,
    ``"never"`` asks nothing.  *middleware* goes around every handler, and *on_event* hears what happens
    (`brokerkit.events`).

    Raises:
        ConfigError: the URL or an option makes no sense.
        InsecureCredentials: a password would travel in plaintext.
    """
    if not isinstance(middleware, Iterable):
        raise ConfigError(f"middleware must be a sequence of functions, not {middleware!r}")
    return Broker(url, options, declare, tuple(middleware), on_event)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


class Broker(Publisher):
    """A connection to one message system, made by `connect`.  Its methods may be called by any task of its event loop."""

    @overload
    def subscribe(
        self,
        address: Topic[T],
        *,
        group: str | None = None,
        start: Start | None = None,
        prefetch: int = 100,
        until_end: bool = False,
        on_invalid: Literal["raise", "skip"] = "raise",
        patient: bool = False,
    ) -> AbstractAsyncContextManager[Subscription[T]]: ...
    @overload
    def subscribe(
        self, address: Queue[T, Any], *, prefetch: int = 100, patient: bool = False
    ) -> AbstractAsyncContextManager[Subscription[T]]: ...
    def subscribe(
        self,
        address: Topic[Any] | Queue[Any, Any],
        *,
        group: str | None = None,
        start: Start | None = None,
        prefetch: int = 100,
        until_end: bool = False,
        on_invalid: Literal["raise", "skip"] = "raise",
        patient: bool = False,
    ) -> AbstractAsyncContextManager[Subscription[Any]]:
        """Read *address* by hand: ``async with broker.subscribe(...) as messages``.

        Entered when ready: what is published afterwards is delivered.  A topic without *group* is read ephemerally, from
        LATEST unless *start* says else: every message, nothing owed, nothing left behind.  A group shares the work, keeps
        its position and begins at EARLIEST; *start* holds only for a group that has no position yet.  With *until_end* it
        ends behind the messages that were there on entering.  At most *prefetch* messages are owned at once.

        *on_invalid*: an ephemeral reader raises `DecodeError` for what it cannot read, or skips it; of queues and groups such
        messages go to the dead letters.  A *patient* subscription is not warned about when it settles nothing for long while it
        has all that *prefetch* allows.
        """
        if isinstance(address, Queue) and (
            group is not None or start is not None or until_end or on_invalid != "raise"
        ):
            raise ConfigError(f"{address!r} is a queue: group, start, until_end and on_invalid are options of topics")
        if on_invalid not in ("raise", "skip"):
            raise ConfigError(f"on_invalid must be 'raise' or 'skip', not {on_invalid!r}")
        if group is not None and on_invalid != "raise":
            raise ConfigError(f"on_invalid is for readers without a group: what {group!r} cannot read is dead-lettered")
        return self._subscribe(address, group, start, prefetch, until_end, on_invalid, patient)

    @asynccontextmanager
    async def _subscribe(
        self,
        address: Topic[Any] | Queue[Any, Any],
        group: str | None,
        start: Start | None,
        prefetch: int,
        until_end: bool,
        on_invalid: Literal["raise", "skip"],
        patient: bool,
    ) -> AsyncGenerator[Subscription[Any]]:
        bound = await self._readable(address)
        if isinstance(address, Queue):
            plans = queue_plans(bound, prefetch=prefetch, by_hand=True, replies=await self._replies_of(bound))
        else:
            plans = topic_plans(
                bound,
                group=group,
                prefix=self._prefix,
                start=start,
                prefetch=prefetch,
                until_end=until_end,
                by_hand=True,
            )
        if patient:
            plans = [structs.replace(plan, patient=True) for plan in plans]
        subscription: Subscription[Any] = Subscription(plans, self.env(), on_invalid)
        await subscription.open()
        self.attach(subscription, (subscription.intake,), subscription.close)
        try:
            yield subscription
        finally:
            self.detach(subscription, (subscription.intake,))
            await subscription.close()

    async def _replies_of(self, bound: Bound) -> AnyTopic | None:
        if bound.reply_codec is None:
            return None
        replies = (await self.replies()).address
        assert isinstance(replies, Topic)
        return replies

    async def _readable(self, address: Address) -> Bound:
        self._check()
        if isinstance(address, DeadLetters):
            raise ConfigError(f"{address!r}: dead letters are browsed and redriven, not subscribed to")
        return await self._bindings.bind(address)

    @overload
    def browse(
        self, address: Topic[T], *, limit: int = 100, start: Start | None = None
    ) -> AsyncIterator[Stored[T]]: ...
    @overload
    def browse(self, address: Queue[T, Any], *, limit: int = 100) -> AsyncIterator[Stored[T]]: ...
    @overload
    def browse(self, address: DeadLetters[T], *, limit: int = 100) -> AsyncIterator[Letter[T]]: ...
    def browse(self, address: Address, *, limit: int = 100, start: Start | None = None) -> AsyncIterator[Stored[Any]]:
        """Iterate over up to *limit* stored messages, oldest first, owning and changing nothing.

        Raises:
            NotFound: the address does not exist.
        """
        self._check()
        whole("limit", limit, low=1, high=1_000_000_000)
        if start is not None and not isinstance(address, Topic):
            raise ConfigError(f"start is an option of topics, not of {address!r}")
        show: Callable[[StoredRecord, Bound], Stored[Any]] = (
            Letter[Any] if isinstance(address, DeadLetters) else Stored[Any]
        )
        pages: Pages[Stored[Any]] = Pages(self._driver, partial(self.bind, address), show, limit, start)
        return pages

    # ------------------------------------------------------------------ looking after

    async def redrive(
        self,
        letters: DeadLetters[T],
        *,
        where: Callable[[Letter[T]], bool] | None = None,
        limit: int | None = None,
        to: Queue[T] | None = None,
        dry_run: bool = False,
    ) -> RedriveReport:
        """Move dead letters back to be handled again, up to the end as it is now.

        A queue's letters go to the queue, those of a topic's group to that group alone (never to the topic), or to *to*.
        Attempts begin anew.  *where* chooses, *limit* bounds how many are moved, *dry_run* only counts.  A letter is stored
        where it goes before it is gone here.
        """
        self._check()
        if not isinstance(letters, DeadLetters):
            raise ConfigError(f"{letters!r}: only dead letters are redriven, like queue.dead_letters")
        if limit is not None:
            whole("limit", limit, low=1, high=1_000_000_000)
        bound = await self.bind(letters)
        return await redrive(
            self._driver, bound, await self._destination(letters, bound, to, dry_run), where, limit, dry_run
        )

    async def _destination(
        self, letters: DeadLetters[Any], bound: Bound, to: AnyQueue | None, dry_run: bool
    ) -> AnyQueue:
        if to is not None:
            if not isinstance(to, Queue):
                raise ConfigError(f"letters are redriven to a queue, not to {to!r}")
            chosen = self._bindings.real(to) if dry_run else (await self.bind(to)).address
            assert isinstance(chosen, Queue)
            return chosen
        real = bound.address
        assert isinstance(real, DeadLetters)
        if isinstance(real.of, Queue):
            await self.bind(letters.of)
            return real.of
        assert real.group is not None
        return redrive_queue(real.of, real.group)

    @overload
    async def backlog(self, address: Topic[Any], group: str) -> Backlog: ...
    @overload
    async def backlog(self, address: Queue[Any, Any] | DeadLetters[Any]) -> Backlog: ...
    async def backlog(self, address: Address, group: str | None = None) -> Backlog:
        """Return what is left to do for a topic's group, for a queue, or how many dead letters there are.

        A group's redriven messages count with those of the topic; a group that has not begun has all of the topic to do.

        Raises:
            NotFound: the address does not exist.
        """
        bound = await self.bind(address)
        if isinstance(address, Topic):
            if group is None:
                raise ConfigError(f"the backlog of {address!r} is that of a group: name it")
            return await self._backlog(bound.address, self._group(group))
        if group is not None:
            raise ConfigError(f"{address!r} has no groups")
        return await self._driver.backlog(Source(bound.address))

    async def _backlog(self, topic: Address, group: str) -> Backlog:
        assert isinstance(topic, Topic)
        first = await self._driver.backlog(Source(topic, group))
        try:
            again = await self._driver.backlog(Source(redrive_queue(topic, group)))
        except NotFound:
            return first  # nothing was ever redriven, and nobody has subscribed
        ages = [age for age in (first.oldest_age, again.oldest_age) if age is not None]
        return Backlog(
            waiting=_sum(first.waiting, again.waiting),
            in_flight=_sum(first.in_flight, again.in_flight),
            delayed=_sum(first.delayed, again.delayed),
            dead=first.dead,  # one address for both
            oldest_age=max(ages, default=None),
        )

    def _group(self, group: str) -> str:
        return self._prefix + check_name(group, "group name")

    async def declare(self, *addresses: Address) -> None:
        """Create what is missing with its address's settings; never alter what exists.

        Raises:
            ConfigError: an address that others own.
        """
        self._check()
        for address in addresses:
            await self._bindings.declare(address)

    async def exists(self, address: Topic[Any] | Queue[Any, Any]) -> bool:
        """Tell whether *address* exists.  It is not created."""
        self._check()
        return await self._driver.describe(self._bindings.real(address)) is not None

    @overload
    async def delete(self, address: Topic[Any], group: str | None = None) -> None: ...
    @overload
    async def delete(self, address: Queue[Any, Any] | DeadLetters[Any]) -> None: ...
    async def delete(self, address: Address, group: str | None = None) -> None:
        """Remove *address* with its messages and dead letters, or only what *group* keeps.  A missing one is no error."""
        self._check()
        of = address.of if isinstance(address, DeadLetters) else address
        if not of.owned and group is None and not isinstance(address, DeadLetters):
            raise ConfigError(f"{address!r} is owned by others (owned=False): it is not deleted here")
        real = self._bindings.real(address)
        await self._driver.delete(real, None if group is None else self._group(group))
        if group is None:
            self._bindings.forget(address)

    async def purge(self, address: Queue[Any, Any] | DeadLetters[Any]) -> int:
        """Remove all waiting messages of a queue, delayed ones included, or all letters; return how many."""
        if isinstance(address, Topic):
            raise ConfigError(f"{address!r} is a topic: its messages go with its retention, or with delete()")
        bound = await self.bind(address)
        assert not isinstance(bound.address, Topic)
        return await self._driver.purge(bound.address)

    async def seek(self, topic: Topic[Any], group: str, start: Start) -> None:
        """Move the position of *group* to *start*.

        Raises:
            ConfigError: the group has live members; stop them first.
            PositionLost: the position is gone from the topic.
            CapabilityError: the backend cannot go back.
        """
        if not isinstance(topic, Topic):
            raise ConfigError(f"{topic!r} is no topic: only topics have positions")
        if not isinstance(start, Start):
            raise ConfigError(f"start must be a Start, like Start.EARLIEST, not {start!r}")
        bound = await self.bind(topic)
        if not bound.capabilities.replay:
            raise bound.refuse("seek")
        await self._driver.seek(Source(bound.address, self._group(group), start))

    async def migrate(self, queue: Queue[Any, Any]) -> None:
        """Move *queue* to the backend's better kind of group, where it has two.

        Raises:
            CapabilityError: this backend has one kind only.
        """
        bound = await self._readable(queue)
        if not bound.capabilities.migrate:
            raise bound.refuse("migrate")
        assert isinstance(bound.address, Queue)
        await self._driver.migrate(bound.address)

    async def health(self) -> Health:
        """Tell whether the connection works and every subscription consumes.  Never raises while the broker is open."""
        self._check()
        found = await self._driver.health()
        problems = [*found.problems, *(line for intake in self._intakes for line in intake.problems())]
        return Health(ok=found.ok and not problems, problems=tuple(problems), connected=found.connected)
