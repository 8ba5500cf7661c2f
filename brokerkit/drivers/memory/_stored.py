"""What the stores of a server have in common: leases, the sessions that hold them, and the checks of a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ...driver import Delivery, Record
from ...errors import BrokerError, BufferFull, ConfigError, TooLarge
from ...policy import MAX_BODY
from .._lone import Lone


class Lease(msgspec.Struct, eq=False, gc=False):
    """The token of one delivery.  Each handing out makes a new one, so an older one of the same record proves nothing."""

    number: int
    """Where the record is: its sequence number in a queue, its offset in a partition."""
    partition: int = 0
    settled: bool = False


class Owner(Protocol):
    """What a server tells the connection that reads."""

    def wake(self) -> bool:
        """There may be something to receive.  Return whether the owner was waiting and comes to look."""
        ...

    def fail(self, error: BrokerError) -> None:
        """Nothing will come any more, because of *error*."""
        ...

    def lost(self, deliveries: Sequence[Delivery]) -> None:
        """*deliveries* belong to others by now."""
        ...

    def revoke(self, deliveries: Sequence[Delivery], moved: Callable[[bool], None]) -> None:
        """*deliveries* are about to move; call *moved* when they may, with whether the program has let go of them."""
        ...


class Session:
    """One consumer as its server knows it.

    While it lives, all it holds is its own, at no cost: nothing is renewed one by one.  `deadline` is when that ends, if no
    sign of life comes.
    """

    __slots__ = ("blocked", "deadline", "held", "lone", "owner", "prefetch", "woken")

    def __init__(self, owner: Owner, prefetch: int) -> None:
        self.owner = owner
        self.prefetch = prefetch
        """How many deliveries it holds at most."""
        self.held: dict[object, Delivery] = {}
        """By `Lease`, the oldest first."""
        self.lone = Lone(self.held, owner.wake)
        """What of it had to come alone."""
        self.blocked = False
        """Whether the last look found only what has to wait until something is settled."""
        self.deadline: float | None = None
        self.woken = False
        """Whether its owner was woken for a record and has not looked yet."""


def too_large(record: Record) -> TooLarge:
    """Return the error for a body over the limit."""
    return TooLarge(
        f"a body of {len(record.body or b'')} bytes for {record.address.name} is over the limit of {MAX_BODY}; "
        "publish a reference instead"
    )


def full(name: str, limit: int) -> BufferFull:
    """Return the error for an address without room."""
    return BufferFull(f"{name} holds {limit} messages, as many as max_messages allows")


def lease_of(delivery: Delivery) -> Lease:
    """Return the token of one of our own deliveries."""
    lease = delivery.token
    assert isinstance(lease, Lease)
    return lease


def number_of(position: str, name: str) -> int:
    """Return the number in ``name@number``, or raise `ConfigError`."""
    owner, at, number = position.rpartition("@")
    if not at or owner != name or not number.isascii() or not number.isdigit():
        raise ConfigError(f"{position!r} is no position in {name}")
    return int(number)
