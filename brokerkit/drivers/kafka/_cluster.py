"""One process's view of a Kafka cluster: brokers, connections, topics, leaders and group coordinators.

Requests that may wait at the broker travel on connections of their own (a *line*), because a broker answers the requests of
one connection one after the other.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, Final, cast

import anyio
from anyio.abc import TaskGroup
from kio.schema.errors import ErrorCode
from kio.schema.metadata.v12.request import MetadataRequest, MetadataRequestTopic
from kio.schema.types import TopicName

from ...errors import BrokerError, BrokerUnavailable, Closed, NotFound
from ._api import Request, offers, schema
from ._connect import connect
from ._errors import of_code
from ._options import Settings
from ._view import TopicInfo, latest, told_of
from ._wire import Wire

logger = logging.getLogger("brokerkit")

PAUSE: Final = 0.05
"""Seconds between two looks at what the cluster is like, at least; and before a call is made again."""
_BURST: Final = 20
"""Looks that follow each other at once where somebody waits, as for each topic that is used for the first time."""
_REGULAR: Final = 30.0
"""Seconds after which metadata is looked at without a cause."""
_ABSENT: Final = 1.0
"""The same while a topic that somebody waits for does not exist; after some such looks"""
_LONG_ABSENT: Final = 2.0
_SOME: Final = 10
_LOOK: Final = 3.0
"""Seconds until another broker is asked for metadata: one that is frozen must not keep everybody waiting."""
_GONE: Final = 0.3
"""Seconds for which brokers must say that a topic is gone: one alone may know less than others."""
_LOOKING: Final = "looking"
"""Metadata is asked for on connections of its own: creating a topic, say, may hold up others for seconds."""
_find_coordinator = schema("FindCoordinator")


class _Line:
    """A connection that is made, or being made."""

    __slots__ = ("waiting", "wire")

    def __init__(self) -> None:
        self.wire: Wire | None = None
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
        self._wires: set[Wire] = set()
        """All that are open, also those that only wait for their last answers."""
        self._tasks: TaskGroup | None = None
        self._context = contextvars.Context()
        self._topics: dict[str, TopicInfo | BrokerError] = {}
        self._missing: dict[str, float] = {}
        """Since when a broker says that a topic is gone, until that is believed."""
        self._watched: Counter[str] = Counter()
        self._asked: set[str] = set()
        self._waiting: list[asyncio.Future[None]] = []
        self._due = asyncio.Event()
        self._wanted = asyncio.Event()
        self._seen = -math.inf
        """When all topics were asked for."""
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
            self._context = contextvars.copy_context()
            async with anyio.create_task_group() as self._tasks:
                await self._first_look()
                started.set_result(None)
                self._tasks.start_soon(self._keep_fresh)
                await stopping.wait()
                self._tasks.cancel_scope.cancel()
        finally:
            self._tasks = None
            for wire in tuple(self._wires):
                wire.close()
            for line in self._lines.values():
                if line.waiting is not None and not line.waiting.done():  # its task has not even begun
                    line.waiting.set_exception(Closed("the connection is closed"))
                    line.waiting.exception()
            self._lines.clear()
            waiting, self._waiting = self._waiting, []
            _tell(waiting, Closed("the connection is closed"))

    def begin(self, task: Callable[..., Coroutine[Any, Any, object]], *args: object) -> None:
        """Run *task* as one of the cluster's, which knows nothing of the context of whoever calls; only while it is open."""
        if self._tasks is not None:
            self._context.run(self._tasks.start_soon, task, *args)

    async def _first_look(self) -> None:
        """Ask each address of the URL until one answers."""
        patience = self.settings.connect_timeout + PAUSE  # so that connecting says itself what is wrong
        problem = BrokerUnavailable(f"no broker of {self.settings.shown} answers")
        for node in self._first:
            try:
                return await self._look(node, patience if len(self._first) == 1 else min(patience, _LOOK))
            except BrokerUnavailable as error:
                problem = error
        raise problem

    @property
    def connected(self) -> bool:
        """Whether any connection is open."""
        return bool(self._wires)

    async def shares(self, *, timeout: float) -> bool:
        """Return whether the cluster's brokers know share groups: all of those that are connected.

        Raises:
            BrokerUnavailable: no broker answered in time.
        """
        if not self.connected:
            await self.refreshed(timeout)
        return all(offers(wire.versions) for wire in self._wires)

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
        wire = self.wire(node, line)
        if wire is None:
            end = loop_time() + timeout
            wire = await self.open(node, line, timeout=timeout)
            timeout = max(0.001, end - loop_time())
        return await wire.send(Request(request), timeout)

    async def _call_any(self, request: Any, timeout: float, line: object = None) -> Any:
        end = loop_time() + timeout
        problem: BrokerError | None = None
        nodes = self._by_health(line)
        for node in nodes:
            left = end - loop_time()
            if left <= 0:
                break
            try:
                patience = left if node == nodes[-1] else min(left, _LOOK)
                return await self.call(node, request, timeout=patience, line=line)
            except BrokerUnavailable as error:
                problem = error
                self._bad[node] = loop_time()
        raise problem or BrokerUnavailable(f"no broker of {self.settings.shown} answers")

    def _by_health(self, line: object) -> list[int]:
        """Return all nodes, those first that failed longest ago or never, connected ones before others."""

        def rank(node: int) -> tuple[float, bool, bool]:
            return (self._bad.get(node, 0.0), self.wire(node, line) is None, node < 0)

        return sorted([*self.brokers, *self._first], key=rank)

    def wire(self, node: int, line: object) -> Wire | None:
        """Return the connection of *line* to *node*, if it is open."""
        entry = self._lines.get((node, line))
        wire = None if entry is None else entry.wire
        return None if wire is None or wire.closed else wire

    async def open(self, node: int, line: object, *, timeout: float) -> Wire:
        """Return the connection of *line* to *node*, made if there is none; several callers share the attempt.

        Raises:
            BrokerUnavailable: there is none within *timeout* seconds.
            AuthenticationError: the credentials were refused.
        """
        wire = self.wire(node, line)
        if wire is not None:
            return wire
        if self._tasks is None:
            raise Closed("the connection is closed")
        entry = self._lines.setdefault((node, line), _Line())
        if entry.waiting is None:
            entry.waiting = asyncio.get_running_loop().create_future()
            self.begin(self._connect, node, line, entry, entry.waiting)
        waiting = entry.waiting
        await asyncio.wait((waiting,), timeout=timeout)
        if not waiting.done():
            raise BrokerUnavailable(f"no connection to {self._shown(node)} in time")
        error = waiting.exception()
        if isinstance(error, BrokerError):
            raise again(error)
        return waiting.result()

    async def _connect(self, node: int, line: object, entry: _Line, waiting: asyncio.Future[Wire]) -> None:
        failure: BrokerError = Closed("the connection is closed")
        wire: Wire | None = None
        try:
            host, port = self._where(node)
            wire = await connect(self.settings, host, port)
            self._bad.pop(node, None)
        except BrokerError as error:
            failure = error
            self._bad[node] = asyncio.get_running_loop().time()
        except Exception as error:
            logger.exception("%s: connecting to %s failed", self.settings.shown, self._shown(node))
            failure = BrokerError(f"the driver failed: {type(error).__name__}")
        finally:
            entry.waiting = None
            if wire is not None and not wire.closed and self._lines.get((node, line)) is entry:
                self._wires.add(wire)
                wire.on_close = partial(self._wires.discard, wire)
                entry.wire = wire
                waiting.set_result(wire)
            else:
                if wire is not None:
                    wire.close()
                    failure = BrokerUnavailable(f"the connection to {self._shown(node)} was closed")
                waiting.set_exception(failure)
                waiting.exception()  # nobody may wait for it any more

    def _where(self, node: int) -> tuple[str, int]:
        place = self._first.get(node) or self.brokers.get(node)
        if place is None:
            raise BrokerUnavailable(f"{self.settings.shown} has no broker {node} at the moment")
        return place

    def _shown(self, node: int) -> str:
        place = self._first.get(node) or self.brokers.get(node)
        return f"broker {node}" if place is None else f"{place[0]}:{place[1]}"

    def drop(self, line: object, node: int | None = None) -> None:
        """Close the connections of *line*, or only the one to *node*."""
        for key in [key for key in self._lines if key[1] is line and node in {None, key[0]}]:
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
        return info if isinstance(info := self._topics.get(name), TopicInfo) else None

    async def topic(self, name: str, *, timeout: float, fresh: bool = False) -> TopicInfo:
        """Return what the cluster says of a topic; with *fresh* it is asked now.

        Raises:
            NotFound: there is no such topic.
            AuthorizationError: it may not be described.
            BrokerUnavailable: no broker answered in time.
        """
        info = self._topics.get(name)
        if fresh or not isinstance(info, TopicInfo):
            loop = asyncio.get_running_loop()
            end = loop.time() + min(timeout, self.settings.timeout)  # who answers nothing for so long is gone
            info = None
            while info is None:
                if loop.time() >= end:
                    raise BrokerUnavailable(f"nothing is known of topic {name} yet")
                self._asked.add(name)
                await self.refreshed(end - loop.time())
                info = None if name in self._missing else self._topics.get(name)
        if isinstance(info, BrokerError):
            raise again(info)
        return info

    def trouble(self, name: str) -> BrokerError | None:
        """Return why a topic is not `known`, if it is known why."""
        return info if isinstance(info := self._topics.get(name), BrokerError) else None

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
        self._wanted.set()
        try:
            async with asyncio.timeout(timeout):
                await waiting
        except TimeoutError:
            raise again(self.problem or BrokerUnavailable(f"no broker of {self.settings.shown} answers")) from None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def _keep_fresh(self) -> None:
        looks = 0
        spare, last = _BURST * PAUSE, loop_time()
        while True:
            absent = {name for name in self._watched if self.known(name) is None}
            patience = _ABSENT if looks < _SOME else _LONG_ABSENT
            with anyio.move_on_after(patience if absent else _REGULAR) as waited:
                await self._due.wait()
            looks = looks + 1 if waited.cancelled_caught else 0
            self._due.clear()
            before = self.problem
            # Many may wait for what comes some day: nothing else has to be looked at for that.
            now = loop_time()
            spare, last = min(spare + now - last, _BURST * PAUSE) - PAUSE, now
            part = absent if waited.cancelled_caught and now - self._seen < _REGULAR else set[str]()
            await self._look_for_all(part)
            if self.problem is not None and before is None:
                logger.warning("%s: %s", self.settings.shown, self.problem)
            elif self.problem is None and before is not None:
                logger.info("%s: the cluster answers again", self.settings.shown)
            fine = self.problem is None
            with anyio.move_on_after(PAUSE if fine else 4 * PAUSE):
                await (self._wanted if fine and spare > 0 else asyncio.Event()).wait()

    async def _look_for_all(self, part: set[str]) -> None:
        """Look at the cluster, or only at *part* of its topics, for those that wait by now."""
        waiting, self._waiting = self._waiting, []
        self._wanted.clear()
        try:
            await self._look(None, max(_LOOK, self.settings.timeout), part)
        except BrokerUnavailable as error:
            self.problem = error
            self._due.set()  # they wait on, until their own time is up
        except BrokerError as error:
            self.problem = error
            _tell(waiting, error)
        except Exception as error:
            logger.exception("%s: a look at the cluster failed", self.settings.shown)
            self.problem = BrokerError(f"the driver failed: {type(error).__name__}")
            _tell(waiting, self.problem)
        else:
            self.problem = None
            _tell(waiting, None)
        finally:
            self._waiting = [each for each in waiting if not each.done()] + self._waiting

    async def _look(self, node: int | None, timeout: float, part: Collection[str] = ()) -> None:
        """Ask for brokers, and for all topics or *part* of them."""
        asked, self._asked = self._asked, set()
        kept = {name for name, info in self._topics.items() if isinstance(info, TopicInfo)}
        names = asked.union(part or kept | set(self._watched))
        if not part:
            self._seen = asyncio.get_running_loop().time()
        request = MetadataRequest(
            topics=tuple(MetadataRequestTopic(topic_id=None, name=cast("TopicName", name)) for name in names),
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
        )
        try:
            if node is None:
                answer = await self._call_any(request, timeout, _LOOKING)
            else:
                answer = await self.call(node, request, timeout=timeout, line=_LOOKING)
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
        name, code = str(topic.name), topic.error_code
        known = self.known(name)
        if code in {ErrorCode.none, ErrorCode.leader_not_available} and topic.partitions:
            self._missing.pop(name, None)
            told = told_of(name, topic)
            if known is not None and known.id == told.id:
                told = latest(known, told)
            if told != known:
                self._topics[name] = told
        elif code is ErrorCode.unknown_topic_or_partition:
            now = asyncio.get_running_loop().time()
            if known is not None and now - self._missing.setdefault(name, now) < _GONE:
                self._due.set()
                return
            self._missing.pop(name, None)
            self._topics[name] = NotFound(f"there is no topic {name} on {self.settings.shown}")
        elif code is not ErrorCode.none and not code.retriable:
            self._missing.pop(name, None)
            self._topics[name] = of_code(int(code), f"DESCRIBE on topic {name}")
        # Else it is being made, or moved: what was known of it stays.

    # ------------------------------------------------------------------ coordinators

    async def coordinator(self, group: str, *, timeout: float) -> int:
        """Return the node that coordinates *group*.

        Raises:
            AuthorizationError: the group may not be described.
            BrokerUnavailable: there is none within *timeout* seconds.
        """
        if (node := self._coordinators.get(group)) is not None:
            return node
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            left = end - loop.time()
            if left <= 0:
                raise BrokerUnavailable(f"group {group} has no coordinator on {self.settings.shown} at the moment")
            answer = await self._call_any(_find_coordinator.FindCoordinatorRequest(key=group), left)
            if answer.error_code is ErrorCode.none:
                node = int(answer.node_id)
                self.brokers.setdefault(node, (answer.host, int(answer.port)))
                self._coordinators[group] = node
                return node
            if not answer.error_code.retriable:
                raise of_code(int(answer.error_code), f"DESCRIBE on group {group}")
            await asyncio.sleep(min(2 * PAUSE, max(0.0, end - loop.time())))

    def forget_coordinator(self, group: str) -> None:
        """Find out anew which node coordinates *group*."""
        self._coordinators.pop(group, None)
        self.stale()


def _tell(waiting: list[asyncio.Future[None]], error: BrokerError | None) -> None:
    for future in waiting:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(again(error))


def loop_time() -> float:
    """Return the time by which deadlines go: the loop's."""
    return asyncio.get_running_loop().time()


def time_left(end: float) -> float:
    """Return for how long something may be waited for until *end*: never for nothing, so that each step says what is wrong."""
    return max(PAUSE, end - loop_time())


def again(error: BrokerError) -> BrokerError:
    """Return *error* as one that may be raised beside others: an exception keeps the traceback of where it was raised."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
