"""`Harness`: what the suite must know about a message system, and what all tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, cast

from ... import clock
from ..._subscription import Subscription
from ...address import Address, AnyQueue, AnyTopic, DeadLetters, Queue, Topic, with_prefix
from ...broker import Broker, connect
from ...driver import Backlog, Capabilities, Driver, Record
from ...errors import BufferFull
from ...events import Event
from ...message import Letter, Message
from ...policy import Start
from ...service import Service

Kind: TypeAlias = Literal["topic", "queue"]
E = TypeVar("E", bound=Event)


class Harness:
    """One system under test, made anew for every test.

    A driver's author fills in the class attributes and the methods of the first part; tests call the second part.  A test
    never says a number of seconds by itself where a real server would have to wait: it uses `lease`, `session` and `quiet`.
    """

    column: ClassVar[str]
    """The driver's name in the promise table."""
    virtual: ClassVar[bool] = False
    """Whether tests run in virtual time, with many seeds; only where nothing outside the process takes part."""
    topics: ClassVar[Capabilities | None] = None
    """What the driver claims for a topic; None if it has none.  Asserted in both directions."""
    queues: ClassVar[Capabilities | None] = None
    """What the driver claims for a queue."""
    lease: ClassVar[float] = 1.0
    """``Queue.lease`` of the queues in tests."""
    session: ClassVar[float] = 10.0
    """Seconds after which a topic's member that has died is certainly replaced."""
    quiet: ClassVar[float] = 0.5
    """Seconds after which a working system has delivered what there is; a check that nothing comes waits as long."""
    prompt: ClassVar[bool] = False
    """Whether others get what a process has in hand as soon as its connections have ended."""
    retention: ClassVar[float] = 1.0
    """``Topic.retention`` of the topics from which `expire` removes records."""
    bounded: ClassVar[Mapping[str, object] | None] = None
    """Options for `connect` with which an address is full after some dozens of messages; None if there are none."""
    consumers: ClassVar[int] = 0
    """Most consumers of a queue of these tests, where they cannot share it: `Capabilities.shared`."""
    dots: ClassVar[bool] = True
    """Whether there may be two addresses whose names differ only in a dot for an underscore."""
    deadline: ClassVar[float] = 60.0
    """Seconds after which a test that waits for something fails."""

    # ------------------------------------------------------------------ written by a driver's author
    async def open(self) -> str:
        """Bring up a fresh, empty system and return its URL."""
        raise NotImplementedError

    async def close(self) -> None:
        """Take the system down.  Called after every test, also a failed one."""

    async def crash(self, broker: Broker) -> None:
        """End *broker*'s process as ``kill -9`` would: nothing is released, its calls raise from now on."""
        raise NotImplementedError

    async def freeze(self, broker: Broker) -> None:
        """Stop *broker*'s process as ``SIGSTOP`` would: it renews nothing, its calls wait."""
        raise NotImplementedError

    async def thaw(self, broker: Broker) -> None:
        """Let *broker*'s process run on after `freeze`; it does not know that time has passed."""
        raise NotImplementedError

    async def disconnect(self, broker: Broker) -> None:
        """Cut the network between *broker* and the system until `reconnect`."""
        raise NotImplementedError

    async def reconnect(self, broker: Broker) -> None:
        """Mend what `disconnect` cut."""
        raise NotImplementedError

    async def lose_replies(self, broker: Broker, count: int = 1) -> None:
        """Let the system store the next *count* publishes of *broker* and lose the answers."""
        raise NotImplementedError

    async def expire(self, broker: Broker, topic: AnyTopic) -> None:
        """Let the system remove all that is in *topic*, whose retention is `retention`.  Here: let so much time pass."""
        await asyncio.sleep(self.retention + self.quiet)

    async def fill(self, broker: Broker, address: AnyTopic | AnyQueue) -> None:
        """Fill *address*, on a broker with the options `bounded`.  Here: publish until it is full."""
        driver, number = self.driver(broker), 0
        while True:
            record = Record(address, f"fill{number}", b"body", timestamp=clock.current().time())
            (result,) = await driver.publish([record], timeout=self.deadline)
            if isinstance(result, BufferFull):
                return
            number += 1
            assert number < 100_000, f"{address.name} is not full after {number} messages"

    async def restart(self) -> None:
        """Restart the system itself.  Called while no connection is open; where it keeps nothing, leave it running."""

    def options(self) -> Mapping[str, object]:
        """Return further options for `connect`."""
        return {}

    # ------------------------------------------------------------------ used by tests
    def __init__(self) -> None:
        self.url = ""
        self.alone = False
        """Whether this test restarts the system: one that several tests use at a time is then not to be used."""
        self.prefix = ""
        """What `connect` puts before all names."""
        self.events: list[Event] = []
        """What every broker of this test has told."""

    async def __aenter__(self) -> Harness:
        self.url = await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def connect(self, **options: Any) -> Broker:
        """Return a broker on this system, to be entered: each is a process of its own to the faults above."""
        options.setdefault("on_event", self.events.append)
        options["options"] = {**self.options(), **options.get("options", {})}
        return connect(self.url, **options)

    another = connect

    def driver(self, broker: Broker) -> Driver:
        """Return *broker*'s driver, for clauses that are the driver's alone."""
        return broker._driver

    @asynccontextmanager
    async def serve(
        self,
        broker: Broker,
        address: AnyTopic | AnyQueue,
        handler: Callable[[Any], Any],
        *,
        name: str = "workers",
        drain: float = 25,
        **options: Any,
    ) -> AsyncIterator[Service[None]]:
        """Run a service of that one handler."""
        service = Service(name)
        subscribe: Any = service.subscribe
        subscribe(address, **options)(handler)
        async with service.running(broker, drain=drain):
            yield service

    @contextmanager
    def wall_clock(self, ahead: float) -> Iterator[None]:
        """Let the wall clock of this process be *ahead* by so many seconds; monotonic time goes on as it was."""
        current: Any = clock.current()
        before = current.time
        current.time = lambda: before() + ahead
        try:
            yield
        finally:
            current.time = before

    def now(self) -> float:
        """Return the time of the loop: durations are differences of it."""
        return asyncio.get_running_loop().time()

    def native(self, broker: Broker, address: Address) -> Any:
        """Return *address* as *broker*'s driver knows it: behind the prefix of the URL."""
        return with_prefix(address, broker.prefix)

    def topic(self, name: str = "topic", type: Any = str, **options: Any) -> Topic[Any]:
        """Return a topic of 4 partitions."""
        options.setdefault("partitions", 4)
        return Topic(name, type, **options)

    def queue(self, name: str = "queue", type: Any = str, **options: Any) -> Queue[Any]:
        """Return a queue with the lease of this harness."""
        options.setdefault("lease", self.lease)
        return Queue(name, type, **options)

    def address(self, kind: Kind, name: str | None = None, type: Any = str) -> AnyTopic | AnyQueue:
        """Return a topic or a queue of default settings."""
        return self.topic(name or kind, type) if kind == "topic" else self.queue(name or kind, type)

    def crowd(self, kind: Kind, wanted: int) -> int:
        """Return *wanted*, or how many consumers of one address there can be, if that is less."""
        shared = kind == "topic" or self.queues is None or self.queues.shared
        return wanted if shared else min(wanted, self.consumers)

    def target(self, name: str = "out", type: Any = str) -> AnyTopic | AnyQueue:
        """Return a further address, for what a test publishes on its way: a queue, where there are queues."""
        return self.address("topic" if self.queues is None else "queue", name, type)

    def letters(self, address: AnyTopic | AnyQueue, group: str = "workers") -> DeadLetters[Any]:
        """Return the dead letters of *address* (and *group*)."""
        return address.dead_letters(group) if isinstance(address, Topic) else address.dead_letters

    def subscribe(
        self,
        broker: Broker,
        address: AnyTopic | AnyQueue,
        *,
        group: str = "workers",
        start: Start | None = None,
        prefetch: int = 100,
        patient: bool = False,
    ) -> AbstractAsyncContextManager[Subscription[Any]]:
        """Subscribe by hand: to a queue, or as a member of *group* to a topic."""
        if isinstance(address, Topic):
            return broker.subscribe(address, group=group, start=start, prefetch=prefetch, patient=patient)
        return broker.subscribe(address, prefetch=prefetch, patient=patient)

    async def backlog(self, broker: Broker, address: Address, group: str = "workers") -> Backlog:
        """Return the backlog of a queue, of dead letters or of *group*."""
        return await (broker.backlog(address, group) if isinstance(address, Topic) else broker.backlog(address))

    async def publish(
        self, broker: Broker, address: AnyTopic | AnyQueue, values: Collection[str], *, key: str | None = None
    ) -> None:
        """Publish *values* one by one, each with itself as id; on a topic under *key*."""
        for value in values:
            if isinstance(address, Topic):
                await broker.publish(address, value, id=value, key=key)
            else:
                await broker.publish(address, value, id=value)

    async def browse(self, broker: Broker, letters: DeadLetters[Any]) -> list[Letter[Any]]:
        """Return all dead letters."""
        return [letter async for letter in broker.browse(letters, limit=100_000)]

    def gone(self, kind: Kind) -> float:
        """Return the seconds after which a consumer that has died owns nothing any more."""
        return (self.session if kind == "topic" else self.lease) + self.quiet

    async def take(self, messages: Subscription[Any], count: int, *, within: float | None = None) -> list[Message[Any]]:
        """Receive exactly *count* messages, or fail after *within* seconds (`deadline`)."""
        taken: list[Message[Any]] = []
        clock = asyncio.get_running_loop().time
        end = clock() + (self.deadline if within is None else within)
        while len(taken) < count:
            left = end - clock()
            assert left > 0, f"only {len(taken)} of {count} messages came: {[m.id for m in taken]}"
            taken += await messages.receive(limit=count - len(taken), timeout=left)
        return taken

    async def drain(self, messages: Subscription[Any], *, quiet: float | None = None) -> list[Message[Any]]:
        """Receive and acknowledge until nothing comes for `quiet` seconds; return what came."""
        taken: list[Message[Any]] = []
        while got := await messages.receive(limit=1000, timeout=self.quiet if quiet is None else quiet):
            taken += got
            for message in got:
                await message.ack()
        return taken

    async def rest(self, broker: Broker, address: AnyTopic | AnyQueue) -> list[Message[Any]]:
        """Receive and acknowledge all that is left in *address*; return it."""
        async with self.subscribe(broker, address) as messages:
            return await self.drain(messages)

    async def nothing(self, messages: Subscription[Any], *, quiet: float | None = None) -> None:
        """Fail if a message comes within `quiet` seconds."""
        got = await messages.receive(limit=1000, timeout=self.quiet if quiet is None else quiet)
        assert not got, f"unexpected: {[(m.id, m.attempt, m.deliveries) for m in got]}"

    async def eventually(
        self, predicate: Callable[[], object | Awaitable[object]], what: str = "", *, within: float | None = None
    ) -> None:
        """Wait until *predicate* (plain or async) holds, or fail after *within* seconds (`deadline`)."""
        clock = asyncio.get_running_loop().time
        end = clock() + (self.deadline if within is None else within)
        pause = 0.001
        while True:
            held: Any = predicate()
            if isinstance(held, Awaitable):
                held = await cast("Awaitable[object]", held)
            if held:
                return
            assert clock() < end, f"it never became true{': ' if what else ''}{what}"
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, self.quiet / 20)

    async def reach(self, number: Callable[[], float], target: float) -> None:
        """Wait until *number* returns *target* or more, or fail after `deadline` seconds."""
        await self.eventually(lambda: number() >= target, f"at least {target}")

    async def moments(self, count: int) -> None:
        """Let *count* moments pass, of which one call to the system takes a few."""
        for _ in range(count):
            await asyncio.sleep(0 if self.virtual else self.quiet / 500)

    async def settle_down(self) -> None:
        """Let everything that is under way happen: `quiet` seconds pass."""
        await asyncio.sleep(self.quiet)

    def seen(self, event: type[E]) -> Sequence[E]:
        """Return the events of that type so far."""
        return [e for e in self.events if isinstance(e, event)]
