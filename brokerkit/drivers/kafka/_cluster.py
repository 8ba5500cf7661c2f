"""One process's view of a Kafka cluster: brokers, connections, topics, leaders and group coordinators.

Requests that may wait at the broker travel on connections of their own (a *line*), because a broker answers the requests of
one connection one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, cast

import anyio
import msgspec
from anyio.abc import TaskGroup
from kio.schema.errors import ErrorCode
from kio.schema.find_coordinator.v3.request import FindCoordinatorRequest
from kio.schema.metadata.v12.request import MetadataRequest, MetadataRequestTopic
from kio.schema.types import TopicName

from ...errors import AuthenticationError, BrokerError, BrokerUnavailable, Closed, ConfigError, NotFound
from ._api import Request
from ._errors import of_code
from ._options import Settings
from ._wire import Wire, connect

logger = logging.getLogger("brokerkit")

PAUSE: Final = 0.05
"""Seconds between two looks at what the cluster is like, at least; and before a call is made again."""
_REGULAR: Final = 30.0
"""Seconds after which metadata is looked at without a cause."""
_ABSENT: Final = 1.0
"""The same while a topic that somebody waits for does not exist."""
_LOOK: Final = 3.0
"""Seconds until another broker is asked for metadata: one that is frozen must not keep everybody waiting."""
_COORDINATOR_ERRORS: Final = {ErrorCode.coordinator_not_available, ErrorCode.coordinator_load_in_progress}


class Partition(msgspec.Struct, frozen=True):
    """One partition of a topic."""

    index: int
    leader: int
    """The node that leads it; -1 while none does."""
    epoch: int


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic as the cluster describes it."""

    name: str
    id: uuid.UUID
    """Another one if the topic was deleted and made again."""
    partitions: tuple[Partition, ...]
    """In order, without gaps."""

    def leader(self, partition: int) -> int:
        """Return the node that leads *partition*, -1 if none does."""
        return self.partitions[partition].leader if partition < len(self.partitions) else -1


class _Line:
    """A connection that is made, or being made."""

    __slots__ = ("failed", "waiting", "wire")

    def __init__(self) -> None:
        self.wire: Wire | None = None
        self.failed: BrokerError | None = None
        self.waiting: asyncio.Future[Wire] | None = None


class Cluster:
    """Connections to all brokers, and what is known of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Nodes below zero are the addresses of the URL: good for asking what the others are.
        self._first = {-1 - place: host for place, host in enumerate(settings.hosts)}
        self.brokers: dict[int, tuple[str, int]] = {}
        self.controller: int | None = None
        """Who creates and deletes topics; with KRaft any broker, which passes it on."""
        self.watchers: set[Callable[[], None]] = set()
        """Called after each look at the cluster."""
        self.problem: BrokerError | None = None
        """Why the last look failed, if it did."""
        self._lines: dict[tuple[int, object], _Line] = {}
        self._tasks: TaskGroup | None = None
        self._topics: dict[str, TopicInfo | BrokerError] = {}
        self._watched: Counter[str] = Counter()
        self._asked: set[str] = set()
        self._waiting: list[asyncio.Future[None]] = []
        self._due = asyncio.Event()
        self._coordinators: dict[str, int] = {}
        self._bad: dict[int, float] = {}
        """When a node failed for the last time: others are asked first."""

    def __repr__(self) -> str:
        return f"<Cluster {self.settings.shown}>"

    # ------------------------------------------------------------------ life

    async def run(self, started: asyncio.Future[None], stopping: asyncio.Event) -> None:
        """Connect, set *started*, and keep the view fresh until *stopping*.

        Raises:
            BrokerUnavailable: no broker answered in time.
            AuthenticationError: the credentials were refused.
        """
        try:
            async with anyio.create_task_group() as self._tasks:
                await self._first_look()
                started.set_result(None)
                self._tasks.start_soon(self._keep_fresh)
                await stopping.wait()
                self._tasks.cancel_scope.cancel()
        finally:
            self._tasks = None
            for line in list(self._lines.values()):
                if line.wire is not None:
                    line.wire.close()
            self._lines.clear()
            self._answer(Closed("the connection is closed"))

    async def _first_look(self) -> None:
        """Ask each address of the URL until one answers."""
        end = asyncio.get_running_loop().time() + self.settings.connect_timeout * len(self._first)
        problem: BrokerError = BrokerUnavailable(f"no broker of {self.settings.shown} answers")
        for node in self._first:
            try:
                left = max(0.1, min(self.settings.connect_timeout, end - asyncio.get_running_loop().time()))
                await self._look(node, left)
            except (AuthenticationError, ConfigError):
                raise
            except BrokerError as error:
                problem = error
            else:
                return
        raise problem

    @property
    def connected(self) -> bool:
        """Whether any connection is open."""
        return any(line.wire is not None and not line.wire.closed for line in self._lines.values())

    # ------------------------------------------------------------------ calls

    async def call(self, node: int | None, request: Any, *, timeout: float, line: object = None) -> Any:
        """Send *request* to *node*, or to any broker, and return the answer.

        Requests of one *line* and node are answered in order.  Cancelling it leaves the connection usable.

        Raises:
            BrokerUnavailable: it was not sent.
            Unanswered: it was sent, and no answer came within *timeout* seconds.
        """
        if node is None:
            return await self._call_any(request, timeout)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        entry = self._lines.get((node, line))
        if entry is not None and entry.wire is not None and not entry.wire.closed:
            return await entry.wire.send(Request(request), timeout)
        wire = await self._connected(node, line, timeout)
        return await wire.send(Request(request), max(0.001, end - loop.time()))

    async def _call_any(self, request: Any, timeout: float) -> Any:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        problem: BrokerError | None = None
        nodes = self._by_health()
        for node in nodes:
            left = end - loop.time()
            if left <= 0:
                break
            try:
                return await self.call(node, request, timeout=left if node == nodes[-1] else min(left, _LOOK))
            except (AuthenticationError, ConfigError):
                raise
            except BrokerUnavailable as error:
                problem = error
                self._bad[node] = loop.time()
        raise problem or BrokerUnavailable(f"no broker of {self.settings.shown} answers")

    def _by_health(self) -> list[int]:
        """Return all nodes, those first that failed longest ago or never, connected ones before others."""

        def rank(node: int) -> tuple[float, bool, bool]:
            line = self._lines.get((node, None))
            connected = line is not None and line.wire is not None and not line.wire.closed
            return (self._bad.get(node, 0.0), not connected, node < 0)

        return sorted([*self.brokers, *self._first], key=rank)

    async def _connected(self, node: int, line: object, timeout: float) -> Wire:
        """Return a connection; several callers share the attempt to make one."""
        tasks = self._tasks
        if tasks is None:
            raise Closed("the connection is closed")
        entry = self._lines.setdefault((node, line), _Line())
        if entry.wire is not None and not entry.wire.closed:
            return entry.wire
        if entry.waiting is None:
            entry.waiting = asyncio.get_running_loop().create_future()
            tasks.start_soon(self._connect, node, line, entry)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(entry.waiting)
        except TimeoutError:
            raise BrokerUnavailable(f"no connection to {self._shown(node)} in time") from None

    async def _connect(self, node: int, line: object, entry: _Line) -> None:
        waiting, entry.waiting = entry.waiting, entry.waiting
        assert waiting is not None
        try:
            host, port = self._where(node)
            wire = await connect(self.settings, host, port)
        except BrokerError as error:
            self._bad[node] = asyncio.get_running_loop().time()
            _fail(waiting, error)
        except BaseException:
            _fail(waiting, Closed("the connection is closed"))
            raise
        else:
            if self._lines.get((node, line)) is entry and self._tasks is not None:
                entry.wire = wire
                self._bad.pop(node, None)
                if not waiting.done():
                    waiting.set_result(wire)
            else:  # dropped meanwhile
                wire.close()
                _fail(waiting, BrokerUnavailable(f"the connection to {self._shown(node)} was closed"))
        finally:
            entry.waiting = None
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # nobody may wait for it any more

    def _where(self, node: int) -> tuple[str, int]:
        place = self._first.get(node) or self.brokers.get(node)
        if place is None:
            raise BrokerUnavailable(f"{self.settings.shown} has no broker {node} at the moment")
        return place

    def _shown(self, node: int) -> str:
        place = self._first.get(node) or self.brokers.get(node)
        return f"broker {node}" if place is None else f"{place[0]}:{place[1]}"

    def drop(self, line: object) -> None:
        """Close the connections of *line*."""
        for key in [key for key in self._lines if key[1] is line]:
            entry = self._lines.pop(key)
            if entry.wire is not None:
                entry.wire.close()

    def drop_node(self, node: int) -> None:
        """Close all connections to *node*: it does not answer."""
        self._bad[node] = asyncio.get_running_loop().time()
        for key in [key for key in self._lines if key[0] == node]:
            entry = self._lines.pop(key)
            if entry.wire is not None:
                entry.wire.close()

    # ------------------------------------------------------------------ topics

    def watch(self, name: str) -> None:
        """Keep *name* in view."""
        self._watched[name] += 1
        if name not in self._topics:
            self.stale()

    def unwatch(self, name: str) -> None:
        """Keep *name* in view no longer than others want it."""
        self._watched[name] -= 1
        if self._watched[name] <= 0:
            del self._watched[name]

    def known(self, name: str) -> TopicInfo | None:
        """Return what is known of a topic, without asking."""
        info = self._topics.get(name)
        return info if isinstance(info, TopicInfo) else None

    async def topic(self, name: str, *, timeout: float, fresh: bool = False) -> TopicInfo:
        """Return what the cluster says of a topic; with *fresh* it is asked now.

        Raises:
            NotFound: there is no such topic.
            AuthorizationError: it may not be described.
            BrokerUnavailable: no broker answered in time.
        """
        info = self._topics.get(name)
        if fresh or not isinstance(info, TopicInfo):
            self._asked.add(name)
            await self.refreshed(timeout)
            info = self._topics.get(name)
        if info is None:
            raise BrokerUnavailable(f"nothing is known of topic {name} yet")
        if isinstance(info, BrokerError):
            raise _again(info)
        return info

    def stale(self) -> None:
        """Look at the cluster again soon: something is not as it was."""
        self._due.set()

    async def refreshed(self, timeout: float) -> None:
        """Return when the cluster was looked at, from now on.

        Raises:
            BrokerUnavailable: no broker answered in time.
        """
        if self._tasks is None:
            raise Closed("the connection is closed")
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._due.set()
        try:
            async with asyncio.timeout(timeout):
                await waiting
        except TimeoutError:
            raise _again(self.problem or BrokerUnavailable(f"no broker of {self.settings.shown} answers")) from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def _keep_fresh(self) -> None:
        while True:
            absent = any(not isinstance(self._topics.get(name), TopicInfo) for name in self._watched)
            with anyio.move_on_after(_ABSENT if absent else _REGULAR):
                await self._due.wait()
            self._due.clear()
            waiting, self._waiting = self._waiting, []
            before = self.problem
            try:
                await self._look(None, max(_LOOK, self.settings.timeout))
            except (AuthenticationError, ConfigError) as error:
                self.problem = error
                _answer(waiting, error)
            except BrokerError as error:
                self.problem = error
                self._waiting = waiting + self._waiting  # they wait on, until their own time is up
                self._due.set()
            except Exception as error:
                logger.exception("%s: a look at the cluster failed", self.settings.shown)
                self.problem = BrokerError(f"the driver failed: {type(error).__name__}")
                _answer(waiting, self.problem)
            else:
                self.problem = None
                _answer(waiting, None)
            if self.problem is not None and before is None:
                logger.warning("%s: %s", self.settings.shown, self.problem)
            elif self.problem is None and before is not None:
                logger.info("%s: the cluster answers again", self.settings.shown)
            await asyncio.sleep(PAUSE if self.problem is None else 4 * PAUSE)

    def _answer(self, error: BrokerError) -> None:
        waiting, self._waiting = self._waiting, []
        _answer(waiting, error)

    async def _look(self, node: int | None, timeout: float) -> None:
        """Ask for brokers and topics."""
        asked, self._asked = self._asked, set()
        kept = {name for name, info in self._topics.items() if isinstance(info, TopicInfo)}
        names = asked | kept | set(self._watched)
        request = MetadataRequest(
            topics=tuple(MetadataRequestTopic(topic_id=None, name=cast("TopicName", name)) for name in names),
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
        )
        try:
            answer = await self.call(node, request, timeout=timeout)
        except BrokerError:
            self._asked |= asked
            raise
        if answer.brokers:
            self.brokers = {int(broker.node_id): (broker.host, int(broker.port)) for broker in answer.brokers}
        self.controller = int(answer.controller_id) if answer.controller_id in self.brokers else None
        for topic in answer.topics:
            self._take_in(topic)
        for watcher in tuple(self.watchers):
            watcher()

    def _take_in(self, topic: Any) -> None:
        name = str(topic.name)
        if topic.error_code in {ErrorCode.none, ErrorCode.leader_not_available} and topic.partitions:
            places = sorted(topic.partitions, key=lambda place: int(place.partition_index))
            self._topics[name] = TopicInfo(
                name,
                topic.topic_id or uuid.UUID(int=0),
                tuple(
                    Partition(int(place.partition_index), int(place.leader_id), int(place.leader_epoch))
                    for place in places
                ),
            )
        elif topic.error_code is ErrorCode.unknown_topic_or_partition:
            self._topics[name] = NotFound(f"there is no topic {name} on {self.settings.shown}")
        elif topic.error_code is not ErrorCode.none and not topic.error_code.retriable:
            self._topics[name] = of_code(int(topic.error_code), f"DESCRIBE on topic {name}")
        # Else it is being made, or moved: what was known of it stays.

    # ------------------------------------------------------------------ coordinators

    async def coordinator(self, group: str, *, timeout: float) -> int:
        """Return the node that coordinates *group*.

        Raises:
            AuthorizationError: the group may not be described.
            BrokerUnavailable: there is none within *timeout* seconds.
        """
        node = self._coordinators.get(group)
        if node is not None:
            return node
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            left = end - loop.time()
            if left <= 0:
                raise BrokerUnavailable(f"group {group} has no coordinator on {self.settings.shown} at the moment")
            answer = await self._call_any(FindCoordinatorRequest(key=group), left)
            if answer.error_code is ErrorCode.none:
                node = int(answer.node_id)
                self.brokers.setdefault(node, (answer.host, int(answer.port)))
                self._coordinators[group] = node
                return node
            if not answer.error_code.retriable and answer.error_code not in _COORDINATOR_ERRORS:
                raise of_code(int(answer.error_code), f"DESCRIBE on group {group}")
            await asyncio.sleep(min(2 * PAUSE, max(0.0, end - loop.time())))

    def forget_coordinator(self, group: str) -> None:
        """Find out anew which node coordinates *group*."""
        self._coordinators.pop(group, None)
        self.stale()


def _answer(waiting: list[asyncio.Future[None]], error: BrokerError | None) -> None:
    for future in waiting:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(_again(error))


def _fail(waiting: asyncio.Future[Wire], error: BrokerError) -> None:
    if not waiting.done():
        waiting.set_exception(error)


def _again(error: BrokerError) -> BrokerError:
    """Return *error* as one that may be raised beside others: an exception keeps the traceback of where it was raised."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
