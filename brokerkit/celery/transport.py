"""The transport: what kombu loads for a URL that is brokerkit's."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from time import monotonic
from typing import Any, ClassVar, Protocol

from kombu.transport import virtual

from ..errors import BrokerError
from . import _hide, _url
from ._bridge import Bridge, acquire
from ._channel import Channel
from ._errors import CHANNEL_ERRORS, CONNECTION_ERRORS
from ._item import Item

__all__ = ["Channel", "Transport"]

SLICE = 0.005
"""Seconds for which messages are handed out before the worker's loop looks at its other events."""


PACE = 0.05
"""Seconds between two looks whether there is room, where no loop of Celery tells."""


class Loop(Protocol):
    """What is asked of the event loop of a worker."""

    on_tick: set[Callable[[], None]]

    def add_reader(self, fds: object, callback: Callable[..., object], *args: object) -> None:
        """Call back when there is something to read."""
        ...

    def remove_reader(self, fd: object) -> None:
        """Call back no more."""
        ...


class Transport(virtual.Transport):  # type: ignore[misc]
    """Carries kombu and Celery over brokerkit; one per connection.

    What comes in is announced by one byte on one descriptor, which is the same for the life of the connection.
    """

    Channel: ClassVar[Any] = Channel
    polling_interval = None
    can_parse_url = _url.Whole()
    driver_type = "brokerkit"
    driver_name = "brokerkit"
    connection_errors = (*virtual.Transport.connection_errors, *CONNECTION_ERRORS)
    channel_errors = (*virtual.Transport.channel_errors, *CHANNEL_ERRORS)
    recoverable_connection_errors = connection_errors
    recoverable_channel_errors: tuple[type[Exception], ...] = ()
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )
    bridge: Bridge
    channels: list[Channel]

    def __init__(self, client: Any, **options: object) -> None:
        super().__init__(client, **options)
        self.driver_type = _system(client)
        _welcome(self.driver_type)
        self._process = os.getpid()
        self._inbox: deque[tuple[Channel, Item]] = deque()
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._signalled = False
        self._error: BaseException | None = None
        self._numbers = 0
        self._numbers_lock = threading.Lock()
        self._stopping: Callable[[], bool] = _never
        self._hub: Loop | None = None
        self._paced: set[Channel] = set()

    # ------------------------------------------------------------------ life

    def establish_connection(self) -> Transport:
        """Connect.

        Raises:
            BrokerUnavailable: no server answered in time.
            AuthenticationError: the credentials were refused.
            ConfigError: the URL or an option makes no sense.
        """
        self.bridge = acquire(_url.target(self.client))
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        return self

    def close_connection(self, connection: object) -> None:
        """Close all channels and let go of the bridge."""
        try:
            with ExitStack() as stack:
                for channel in self.channels:  # all of them, if one of them fails too
                    stack.callback(channel.close)
        finally:
            super().close_connection(connection)
            self._unhook()
            reader, writer = self._reader, self._writer
            self._reader = self._writer = None
            if reader is not None and writer is not None:
                reader.close()
                writer.close()
                self.bridge.release()

    def close_channel(self, channel: Channel) -> None:
        """Forget *channel*, which is closed."""
        self._paced.discard(channel)
        super().close_channel(channel)

    def create_channel(self, connection: Transport) -> Channel:
        """Open a channel of *connection*, which is another transport where kombu went on to another host meanwhile."""
        channel = Channel(connection)
        connection.channels.append(channel)
        return channel

    def next_channel_id(self) -> int:
        """Return a number for a new channel."""
        with self._numbers_lock:
            self._numbers = self._numbers % self.channel_max + 1
            self._used_channel_ids.append(self._numbers)
            return self._numbers

    def verify_connection(self, connection: object) -> bool:
        """Tell whether it is connected."""
        return self._reader is not None

    def _collect(self, connection: object) -> None:
        """Let go of a connection: kombu calls this after errors, and in the children that a worker forks."""
        if self._process == os.getpid():
            with suppress(BrokerError, OSError):
                self.close_connection(connection)
            return
        # The channels are the parent's: nothing of them is touched.
        for channel in self.channels:
            channel.abandon()
        self.channels.clear()
        self._inbox.clear()
        self._used_channel_ids = array("H")
        reader, writer = self._reader, self._writer
        self._reader = self._writer = None
        for end in (reader, writer):
            if end is not None:
                end.close()

    # ------------------------------------------------------------------ called on the loop thread

    def deliver(self, channel: Channel, items: Sequence[Item]) -> None:
        """Take *items* for the thread that drains events, and wake it."""
        self._inbox.extend([(channel, item) for item in items])
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Have *error* raised in the thread that drains events: consuming has ended."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if not self._signalled:
            self._signalled = True
            writer = self._writer
            if writer is not None:
                with suppress(OSError):  # closed meanwhile; the buffer cannot be full, with one byte at a time
                    writer.send(b"\0")

    def _stir(self, **_: object) -> None:
        self._wake()

    # ------------------------------------------------------------------ in the thread that drains events

    def _hand_out(self, until: float, *, singly: bool = False) -> int:
        """Hand messages to their consumers until then, one at least; return how many.

        With *singly* one of a transient queue is the last, as who asks for so many answers drains once for each of them, and
        one that is not acknowledged, as it is gone when its consumer has it.
        The byte that woke this stays where it is while there is more to do, so that a poll returns again at once.
        """
        inbox = self._inbox
        number = 0
        while True:
            if not inbox:
                self._listen()
                if not inbox or number:  # what came just now has woken again
                    break
            if self._error is not None:
                break
            channel, item = inbox.popleft()
            if channel.hand_over(item):
                number += 1
                if singly and (item.no_ack or item.message is None):
                    break
            if monotonic() >= until or self._stopping():
                break
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return number

    def _listen(self) -> None:
        """Take the byte, so that the next message wakes again."""
        reader = self._reader
        if reader is not None:
            with suppress(BlockingIOError, InterruptedError):
                reader.recv(16)
        self._signalled = False
        if self._inbox or self._error is not None:
            self._wake()

    def drain_events(self, connection: Transport, timeout: float | None = None) -> None:
        """Hand out what has come; wait for the first message up to *timeout* seconds, or for ever.

        Raises:
            TimeoutError: none came.
        """
        if connection is not self:
            return connection.drain_events(connection, timeout)
        until = None if timeout is None else monotonic() + timeout
        while not self._hand_out(monotonic() + SLICE, singly=True):
            reader = self._reader
            if reader is None:
                raise ConnectionError("the connection is closed")
            left = None if until is None else until - monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            if self._paced:
                self._pace()
                left = PACE if left is None else min(left, PACE)
            _wait(reader, left)
        return None

    def register_with_event_loop(self, connection: object, loop: Loop) -> None:
        """Have Celery's loop call this when something comes."""
        state = sys.modules.get("celery.worker.state")
        if state is not None:
            # Each is None or False, or the exit code, which may be 0.
            self._stopping = lambda: _asked(state.should_stop) or _asked(state.should_terminate)
            signals = sys.modules["celery.signals"]
            # The loop looks whether to stop when it wakes: without this, up to a second after the signal.
            signals.worker_shutting_down.connect(self._stir)
        loop.add_reader(self._reader, self.on_readable, connection, loop)
        self._hub = loop
        if self._paced:
            loop.on_tick.add(self._pace)

    def unregister_from_event_loop(self, connection: object, loop: Loop) -> None:
        """Take `register_with_event_loop` back."""
        self._unhook()

    def _unhook(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.on_tick.discard(self._pace)
            if self._reader is not None:
                hub.remove_reader(self._reader)

    def pace(self, channel: Channel) -> None:
        """Have *channel* asked again and again whether it may fetch: what makes room is seen by Celery's loop alone."""
        self._paced.add(channel)
        if self._hub is not None:
            self._hub.on_tick.add(self._pace)

    def _pace(self) -> None:
        for channel in self._paced:
            channel.pace()

    def on_readable(self, connection: object, loop: object) -> None:
        """Hand out what has come."""
        self._hand_out(monotonic() + SLICE)

    def take_back(self, channel: Channel, queue: str | None) -> list[Item]:
        """Return what was delivered to *channel* (of *queue*) and not handed out; it is not handed out any more."""
        taken: list[Item] = []
        inbox = self._inbox
        for _ in range(len(inbox)):
            entry = inbox.popleft()
            if entry[0] is channel and queue in (None, entry[1].queue):
                taken.append(entry[1])
            else:
                inbox.append(entry)
        return taken

    # ------------------------------------------------------------------ what kombu asks

    def driver_version(self) -> str:
        """Return the version of brokerkit."""
        from importlib.metadata import version

        return version("brokerkit")

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """Return the URL of the connection to be shown."""
        return _hide.as_uri(self.client, include_password, mask)

    @property
    def default_connection_params(self) -> dict[str, object]:
        """What a URL leaves out."""
        return dict(_url.defaults(self.client))


def _system(client: Any) -> str:
    try:
        target = _url.target(client)
        if "celery.worker.worker" in sys.modules:
            # Imports the driver in the process of which the pool is forked, and not in each of its children.
            target.connect()
    except BrokerError:
        return "brokerkit"  # what is wrong is said when it connects
    return target.system


def _asked(flag: object) -> bool:
    return flag is not None and flag is not False


def _never() -> bool:
    return False


def _wait(reader: socket.socket, timeout: float | None) -> None:
    # poll, as select cannot take descriptors above 1,023; patched by gevent, so that other greenlets go on.
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.poll(None if timeout is None else max(int(timeout * 1000 + 0.999), 0))


def _welcome(driver_type: str) -> None:
    """Let workers find each other (mingle, gossip) over this transport: Celery names those that can in sets of its own."""
    for module, name in (("celery.worker.consumer.mingle", "Mingle"), ("celery.worker.consumer.gossip", "Gossip")):
        step: Any = getattr(sys.modules.get(module), name, None)
        if step is not None and driver_type not in step.compatible_transports:
            step.compatible_transports = {*step.compatible_transports, driver_type}
