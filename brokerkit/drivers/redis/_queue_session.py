"""What a consumer of a queue holds, and by what right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ...driver import Delivery
from ...errors import DeliveryLost
from .._lone import Lone


class Lease(msgspec.Struct, eq=False, gc=False):
    """The token of one delivery.  Each handing out makes a new one, so an older one of the same message proves nothing."""

    number: bytes
    """The first six bytes of the element: its field in what the session holds."""
    settled: bool = False
    tried: bool = False
    """Whether it may have been settled by a call whose answer is missing."""


class Session:
    """What a consumer is to the server: all that it holds is its own for a lease from the last sign of life on."""

    __slots__ = (
        "asking",
        "drains",
        "flights",
        "given",
        "held",
        "kept",
        "listed",
        "lock",
        "lone",
        "lost",
        "name",
        "owned",
        "past",
        "pressed",
        "unsure",
    )

    def __init__(self, name: bytes, owned: float, wake: Callable[[], object]) -> None:
        self.name = name
        self.past: list[bytes] = []
        """Names that it had before, if the server may not know the present one yet."""
        self.owned = owned
        """Until when, on this process's monotonic clock, it certainly owns what it holds."""
        self.held: dict[object, Delivery] = {}
        """By `Lease`, the oldest first."""
        self.asking = 0
        """Calls under way that change what it holds."""
        self.given: list[Delivery] = []
        """What came without being asked for, and was not handed out yet."""
        self.flights: list[list[bytes]] = []
        """Numbers that are being settled."""
        self.lone = Lone(self.held, wake)
        """What had to come alone; *wake* is called when it holds up nothing any more."""
        self.drains = False
        """Whether it must have its hands free, but for what is proven, before it gets more."""
        self.pressed = False
        """Whether it was woken nevertheless, and asks whether that still holds."""
        self.listed = False
        """Whether it may be in the server's list of those who wait."""
        self.kept = False
        """Whether it is in that list for certain, as the server has said since it last asked: it need not ask."""
        self.unsure = False
        """Whether replies are missing that have told what it holds."""
        self.lost = False
        """Whether it is over: what it held belongs to others."""
        self.lock = asyncio.Lock()


def unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
