"""A server: everything that is stored, whoever is connected."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from ...address import Address, AnyDeadLetters, AnyQueue, AnyTopic, DeadLetters, Queue, Topic, internal
from ...driver import Backlog, Source, redriven
from ...errors import BrokerError, ConfigError, NotFound, SettingsMismatch
from ._group import Group
from ._letters import Letters
from ._queue import QueueStore
from ._stored import full, number_of
from ._timers import Timers
from ._topic import TopicStore

Store: TypeAlias = TopicStore | QueueStore | Letters


class Connection(Protocol):
    """What a server knows of its connections."""

    def forget(self) -> None:
        """What was looked up may be gone."""
        ...

    def abandoned(self) -> None:
        """The event loop of this connection is closed: nothing on it will ever run again."""
        ...


class Server:
    """Topics, queues and dead letters by name.  Connections come and go."""

    def __init__(self, name: str, max_messages: int) -> None:
        self.name = name
        self.max_messages = max_messages
        self.timers = Timers()
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[Connection, None] = {}
        self._topics: dict[str, TopicStore] = {}
        self._groups: dict[str, dict[str, Group]] = {}
        self._queues: dict[str, QueueStore] = {}
        self._letters: dict[str, Letters] = {}

    # ------------------------------------------------------------------ connections

    def attach(self, connection: Connection, max_messages: int | None) -> None:
        """Serve *connection*, in the running event loop.

        Raises:
            ConfigError: another loop or process uses this server, or it was made with another *max_messages*.
        """
        loop = asyncio.get_running_loop()
        if os.getpid() != self._process:
            raise ConfigError(f"{self} belongs to the process that made it; after a fork use a name of your own")
        if max_messages not in (None, self.max_messages):
            raise ConfigError(f"{self} was made with max_messages={self.max_messages}, not {max_messages}")
        if loop is not self._loop:
            if self._loop is not None and self._loop.is_closed():
                self._abandon(loop)
            elif self._connections:
                raise ConfigError(f"{self} is in use in another event loop of this process")
            else:
                self._bind(loop)
        self._connections[connection] = None

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """The last loop ended without closing its connections, as a process that was killed."""
        self._bind(loop)
        connections, self._connections = self._connections, {}
        for connection in connections:
            connection.abandoned()

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.timers.bind(loop)

    def detach(self, connection: Connection) -> None:
        """Forget *connection*."""
        self._connections.pop(connection, None)
        if not self._connections:
            self.timers.unbind()
            self._loop = None

    def __str__(self) -> str:
        return f"memory://{self.name}"

    # ------------------------------------------------------------------ finding

    def find(self, address: Address, *, copy: bool = False) -> Store:
        """Return the store of *address*; for a *copy*, derived names need no declaration.

        Raises:
            NotFound: *address* was never declared.
            SettingsMismatch: its name is another kind of address.
        """
        if isinstance(address, DeadLetters):
            return self.letters(address, create=copy)
        if isinstance(address, Topic):
            return self.topic(address, create=copy)
        return self.queue(address, create=copy)

    def topic(self, address: AnyTopic, *, create: bool = False) -> TopicStore:
        """Return the topic; *create* a derived one that is missing."""
        store = self._topics.get(address.name)
        if store is None:
            self._may_create(address, create=create)
            store = self._add_topic(address)
        return store

    def queue(self, address: AnyQueue, *, create: bool = False) -> QueueStore:
        """Return the queue; *create* a derived one that is missing."""
        store = self._queues.get(address.name)
        if store is None:
            self._may_create(address, create=create)
            store = self._add_queue(address)
        return store

    def letters(self, address: AnyDeadLetters, *, create: bool = False) -> Letters:
        """Return the dead letters.  Those of what was declared exist, though there may be none yet."""
        store = self._letters.get(address.name)
        if store is None:
            if not create and address.of.name not in self._topics and address.of.name not in self._queues:
                raise NotFound(f"{address!r} does not exist on {self}")
            store = self._letters[address.name] = Letters(address.name)
        return store

    def _may_create(self, address: AnyTopic | AnyQueue, *, create: bool) -> None:
        if address.name in (self._queues if isinstance(address, Topic) else self._topics):
            other = "queue" if isinstance(address, Topic) else "topic"
            raise SettingsMismatch(f"{address!r}: that name is a {other} on {self}")
        if not create or ".." not in address.name:
            raise NotFound(f"{address!r} does not exist on {self}; declare it")

    def group(self, source: Source) -> Group:
        """Return the group of a topic as it is, or as it would begin."""
        topic = self.topic(topic_of(source))
        group = self._groups[topic.name].get(source.group or "")
        return group or Group(topic, source.group, topic.resolve(source.start), self.timers)

    def reader(self, source: Source) -> Group:
        """Return the group that reads *source*, with its start stored: an existing one, a new one, one for this reader."""
        topic = self.topic(topic_of(source), create=True)
        groups = self._groups[topic.name]
        if source.group is not None and source.group in groups:
            return groups[source.group]
        group = Group(topic, source.group, topic.resolve(source.start), self.timers)
        if source.group is not None:
            groups[source.group] = topic.groups[source.group] = group
        return group

    # ------------------------------------------------------------------ administration

    def declare(self, address: Address) -> None:
        """Create *address* if it is missing, with what belongs to it.

        Raises:
            SettingsMismatch: its name is another kind of address.
        """
        if isinstance(address, DeadLetters):
            self.letters(address, create=True)
            return
        try:
            self.find(address)
        except NotFound:
            if isinstance(address, Topic):
                self._add_topic(address)
                return
            self._add_queue(address)
            if ".." not in address.name:
                self.letters(address.dead_letters, create=True)

    def _add_topic(self, address: AnyTopic) -> TopicStore:
        topic = TopicStore(address, self.max_messages, self.timers, derived=".." in address.name)
        self._topics[address.name] = topic
        self._groups[address.name] = {}
        return topic

    def _add_queue(self, address: AnyQueue) -> QueueStore:
        queue = self._queues[address.name] = QueueStore(address, self.max_messages, self.timers)
        return queue

    def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings of *address*, None if it is missing.

        Raises:
            SettingsMismatch: its name is another kind of address.
        """
        if isinstance(address, DeadLetters):
            return {} if address.name in self._letters else None
        try:
            found = self.topic(address).address if isinstance(address, Topic) else self.queue(address).address
        except NotFound:
            return None
        names = ("partitions", "retention") if isinstance(found, Topic) else ("priorities", "dedup", "lease")
        return {name: getattr(found, name) for name in names}

    def delete(self, address: Address, group: str | None) -> None:
        """Remove *address* with all that is derived from it, or only what belongs to *group*."""
        if isinstance(address, DeadLetters):
            self._letters.pop(address.name, None)
        elif group is not None:
            self._delete_group(address.name, group)
        elif isinstance(address, Topic):
            for name in list(self._groups.get(address.name, ())):
                self._delete_group(address.name, name)
            self._groups.pop(address.name, None)
            topic = self._topics.pop(address.name, None)
            if topic is not None:
                for reader in list(topic.readers):
                    reader.drop(f"the topic {address.name} was deleted")
            self._delete_derived(internal(address.name, ""))
        else:
            queue = self._queues.pop(address.name, None)
            if queue is not None:
                queue.drop()
            self._delete_derived(internal(address.name, ""))
        for connection in self._connections:
            connection.forget()

    def _delete_group(self, topic: str, name: str) -> None:
        group = self._groups.get(topic, {}).pop(name, None)
        if group is not None:
            self._topics[topic].groups.pop(name, None)
            group.drop(f"the group {name} of {topic} was deleted")
        self._delete_derived(internal(topic, name, ""))

    def _delete_derived(self, beginning: str) -> None:
        for name in [name for name in self._letters if name.startswith(beginning)]:
            del self._letters[name]
        for name in [name for name in self._queues if name.startswith(beginning)]:
            self._queues.pop(name).drop()

    def redrive(self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue) -> Sequence[BrokerError | None]:
        """Move letters to *to*; one result each."""
        source, target = self.letters(letters), self.queue(to, create=True)
        results: list[BrokerError | None] = []
        for position in positions:
            number = number_of(position, source.name)
            letter = source.get(number)
            if letter is None:
                results.append(NotFound(f"there is no letter {position}"))
            elif not target.room():
                results.append(full(target.name, self.max_messages))
            else:
                target.keep(redriven(letter.record, to))
                source.remove(number)
                results.append(None)
        return results

    def seek(self, source: Source) -> None:
        """Move the position of a group, or store that of a new one.

        Raises:
            ConfigError: the group has live members.
        """
        if source.group is None:
            raise ConfigError("only a group has a position")
        group = self.reader(source)
        if group.members:
            raise ConfigError(
                f"group {source.group!r} of {source.address.name} has {len(group.members)} live members; stop them first"
            )
        group.seek(group.topic.resolve(source.start))

    def backlog(self, source: Source, expired: Callable[[str, int], None]) -> Backlog:
        """Return what is left to do."""
        address = source.address
        if isinstance(address, DeadLetters):
            letters = self.letters(address)
            oldest = letters.oldest()
            age = None if oldest is None else max(0.0, self.timers.epoch() - oldest)
            return Backlog(waiting=len(letters), in_flight=0, delayed=0, oldest_age=age)
        if isinstance(address, Queue):
            return self.queue(address).backlog(self._dead(address.name), functools.partial(expired, address.name))
        self.topic(address).refresh()
        if source.group is None:
            return Backlog()
        return self.group(source).backlog(self._dead(address.name, source.group))

    def _dead(self, *name: str) -> int:
        letters = self._letters.get(internal(*name, "dead"))
        return 0 if letters is None else len(letters)


def topic_of(source: Source) -> AnyTopic:
    """Return the topic that *source* reads, or raise `ConfigError`."""
    if not isinstance(source.address, Topic):
        raise ConfigError(f"{source.address!r} has no groups; only topics do")
    return source.address
