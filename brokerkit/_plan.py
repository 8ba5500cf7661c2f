"""What a session is made for: the source it reads, how its messages end, and what it needs of its broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from .address import Address, AnyDeadLetters, AnyTopic, Outgoing
from .clock import Clock
from .driver import Driver, Record, Source
from .events import Listener
from .message import Message, Reader


class Inbox(Protocol):
    """Where a session puts messages that may run now: an intake."""

    closed: bool

    def push(self, message: Message[Any]) -> None: ...
    def push_all(self, messages: Sequence[Message[Any]]) -> None: ...
    def push_front(self, messages: Sequence[Message[Any]]) -> None: ...
    def drop(self, dropped: Callable[[Message[Any]], bool]) -> list[Message[Any]]: ...


class Env(msgspec.Struct, frozen=True):
    """What sessions need of their broker."""

    driver: Driver
    clock: Clock
    emit: Listener | None
    stage: Callable[[Outgoing[Any]], Awaitable[Record]]
    new_id: Callable[[], str]
    restore: Callable[[Address], Awaitable[bool]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one feed reads and how: fixed for all of its sessions."""

    source: Source
    reader: Reader
    prefetch: int
    letters: AnyDeadLetters | None
    """Where messages die; None for an ephemeral reader."""
    replies: AnyTopic | None = None
    """Where failures of requests are answered; None where nothing is answered."""
    in_place: bool
    """Retry without a copy, holding the key."""
    by_key: bool
    """At most one message of a key is out."""
    by_hand: bool = False
    patient: bool = False
    """Say nothing of messages that are in hand for long."""
    max_deliveries: int = 10
    lease: float = 60.0

    beside: Source | None = None
    """The group's topic, of which this is the private redrive queue."""

    @property
    def told(self) -> Source:
        """What logs and events name: a group's redriven messages are the group's, whatever queue they come through."""
        return self.beside or self.source

    @property
    def name(self) -> str:
        """The address and group, for logs."""
        group = self.told.group
        return self.told.address.name + (f" (group {group})" if group else "")
