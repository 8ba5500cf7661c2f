"""Revoked tasks, kept in the broker: a task that waits stays revoked when all workers have been restarted."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from kombu import serialization

from ..broker import Broker
from ..errors import DecodeError
from ..policy import Start
from ._envelope import unseal
from ._names import Names

logger = logging.getLogger("brokerkit")

MANY: Final = 50_000
"""Ids that are kept in mind, the newest: as many as Celery's worker keeps."""
MANY_STAMPS: Final = 1000
SLACK: Final = 300.0
"""Seconds by which the clock of who published a task may be ahead of the clock of who revoked it.

What was published later is not revoked by it: an id that the program chose itself may come again tomorrow.
"""
_METHODS: Final = frozenset(("revoke", "terminate", "revoke_by_stamped_headers"))
_HINTS: Final = (b"revoke", b"terminate")
_ACCEPT: Final = ("json", "yaml", "msgpack", "application/json", "application/x-yaml", "application/x-msgpack")
_PIDBOX: Final = ".pidbox"


class Revoked(msgspec.Struct):
    """One record of the topic of revokes."""

    at: float
    ids: list[str] = []
    stamps: dict[str, list[str]] = {}
    """Tasks that carry one of these values of a stamped header."""
    nodes: list[str] | None = None
    """The workers that are meant; None: all."""


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Revoked).decode


def is_control(exchange: str) -> bool:
    """Return whether workers get their commands through the fanout *exchange*: Kombu calls it ``<namespace>.pidbox``."""
    return exchange.endswith(_PIDBOX)


def revoked_by(body: bytes, at: float) -> Revoked | None:
    """Return what the command *body*, sealed at the time *at*, revokes; None if it does something else."""
    if not any(hint in body for hint in _HINTS) and b'"base64"' not in body:
        return None
    try:
        payload = unseal(body)
        command: Any = serialization.loads(
            payload["body"], payload.get("content-type"), payload.get("content-encoding"), accept=_ACCEPT
        )
    except Exception as error:  # whatever a serializer raises: it is no command that we know
        logger.debug("a command to workers cannot be read: %r", error)
        return None
    if not isinstance(command, dict):
        return None
    method, arguments = command.get("method"), command.get("arguments")
    if not isinstance(method, str) or method not in _METHODS or not isinstance(arguments, Mapping):
        return None
    nodes = command.get("destination")
    return Revoked(
        at,
        _texts(arguments.get("task_id")),
        {str(name): _texts(values) for name, values in _items(arguments.get("headers"))},
        None if not nodes else _texts(nodes),
    )


def _items(value: object) -> Iterable[tuple[object, object]]:
    if isinstance(value, list):  # as the command line gives them
        return [(name, text) for name, equals, text in (str(each).partition("=") for each in value) if equals]
    return value.items() if isinstance(value, Mapping) else ()


def _texts(value: object) -> list[str]:
    if value is None:
        return []
    return [str(each) for each in value] if isinstance(value, (list, tuple, set)) else [str(value)]


class Revokes:
    """What this process knows of revoked tasks."""

    def __init__(self, broker: Broker, names: Names) -> None:
        self._broker = broker
        self._topic = names.revokes
        self._ids: dict[str, float] = {}
        """When each was revoked, the oldest first."""
        self._stamps: dict[tuple[str, str], float] = {}
        self._nodes: set[str] = set()
        self._aimed: list[Revoked] = []
        """Meant for certain workers, and learned before it was known which one this is."""

    def serve(self, queue: str) -> None:
        """Say that this process is the worker that gets its commands through *queue*, ``<node>.<namespace>.pidbox``."""
        self._nodes.add(queue.removesuffix(_PIDBOX).rpartition(".")[0])
        aimed, self._aimed = self._aimed, []
        for revoked in aimed:
            self._learn(revoked)

    @property
    def wanted(self) -> bool:
        """Whether this process is a worker, which may have no remote control yet: some pools begin it behind the tasks."""
        return self.serving or "celery.worker.consumer.consumer" in sys.modules

    @property
    def serving(self) -> bool:
        """Whether this process is a worker with a remote control."""
        return bool(self._nodes)

    def begun(self) -> set[str] | None:
        """Return the ids of the tasks that Celery's worker in this process has begun; None if there is no worker."""
        state = sys.modules.get("celery.worker.state")
        if state is None or not (self.serving or state.reserved_requests or state.active_requests):
            return None
        return {request.id for request in state.active_requests}

    async def note(self, body: bytes, timeout: float) -> None:
        """Keep what the command *body* revokes, if it does, before the workers get it."""
        revoked = revoked_by(body, time.time())
        if revoked is not None:
            await self._broker.publish(self._topic, _encode(revoked), timeout=timeout)

    def heard(self, body: bytes, at: float) -> None:
        """Learn from the command *body*, which the worker gets as well: it forgets what was revoked after some hours.

        Not of stamps, which it keeps.
        """
        revoked = revoked_by(body, at)
        if revoked is not None:
            self._learn(Revoked(revoked.at, revoked.ids, {}, revoked.nodes))

    async def load(self) -> None:
        """Learn what was revoked before; return when all of it is known."""
        async with self._broker.subscribe(
            self._topic, start=Start.EARLIEST, until_end=True, prefetch=1000, on_invalid="skip"
        ) as stored:
            while messages := await stored.receive(limit=1000):
                for message in messages:
                    try:
                        self._learn(_decode(message.body))
                    except (msgspec.DecodeError, DecodeError):
                        logger.warning("%s: %s is no revoke", self._topic.name, message.position)

    def _learn(self, revoked: Revoked) -> None:
        if revoked.nodes is not None and not self._nodes.intersection(revoked.nodes):
            if not self._nodes and len(self._aimed) < MANY:
                self._aimed.append(revoked)
            return
        for id in revoked.ids:
            self._ids.pop(id, None)
            self._ids[id] = revoked.at
        while len(self._ids) > MANY:
            del self._ids[next(iter(self._ids))]
        for name, values in revoked.stamps.items():
            for value in values:
                self._stamps.pop((name, value), None)
                self._stamps[name, value] = revoked.at
        while len(self._stamps) > MANY_STAMPS:
            del self._stamps[next(iter(self._stamps))]

    def __bool__(self) -> bool:
        """Whether anything is revoked."""
        return bool(self._ids or self._stamps)

    def look(self, headers: Mapping[str, Any], published: float) -> bool:
        """Tell Celery's worker of the task with *headers*, *published* at that time, if it is revoked; return whether."""
        id = headers.get("id")
        at = self._ids.get(id, 0.0) if isinstance(id, str) else 0.0
        if self._stamps:
            at = max(at, self._by_stamp(headers))
        if not at or published > at + SLACK:
            return False
        state = sys.modules.get("celery.worker.state")
        if state is not None:
            state.revoked.add(id)
        return True

    def _by_stamp(self, headers: Mapping[str, Any]) -> float:
        stamps = headers.get("stamps")
        if not isinstance(stamps, Mapping):
            return 0.0
        return max(
            (self._stamps.get((str(name), value), 0.0) for name, values in stamps.items() for value in _texts(values)),
            default=0.0,
        )
