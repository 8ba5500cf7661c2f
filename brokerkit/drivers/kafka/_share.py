"""A member of a share group: it acquires records of one topic, keeps them for as long as they are in hand, and acknowledges each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ...errors import BrokerError
from ._cluster import Cluster
from ._share_locks import Lock, ShareTold


class Share:
    """What one member acquires of one topic, from all brokers that lead its partitions."""

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        group: str,
        member: str,
        told: ShareTold,
        *,
        timeout: float,
        lock: float | None,
        window: int = 2000,
    ) -> None:
        """*lock* is how long the broker is expected to lock a record for, until it says so itself; *window* is how many a
        partition hands out behind the oldest that is not done.
        """
        self.problem: BrokerError | None = None
        """Why nothing comes, if that is known."""
        raise NotImplementedError

    @property
    def room(self) -> int:
        """How many more records may be acquired.

        It becomes less by itself with each that comes, and more with each untaken one that is dropped; set it to what it
        should be by now whenever that changes, which wakes who asks the brokers.  It may fall below zero: while something
        is adrift as much is acquired beyond it.
        """
        raise NotImplementedError

    @room.setter
    def room(self, room: int) -> None: ...

    async def run(self) -> None:
        """Acquire, renew and acknowledge until cancelled."""
        raise NotImplementedError

    def take(self, most: int) -> list[Lock]:
        """Return up to *most* that were acquired, in order of arrival, all ours at the moment."""
        raise NotImplementedError

    def untaken(self) -> int:
        """Return how many could be taken."""
        raise NotImplementedError

    def accept(self, lock: Lock) -> None:
        """Be done with *lock*, for good.  The broker is told at once, together with all others of the same tick.

        One that is adrift is accepted if it is acquired again.  Doing it again, or for one that is lost, does nothing.
        """
        raise NotImplementedError

    def release(self, lock: Lock) -> None:
        """Hand *lock* back: somebody gets it at once, which the broker counts."""
        raise NotImplementedError

    def confirmed(self, lock: Lock) -> asyncio.Future[BrokerError | None]:
        """Return what becomes of an accepted *lock*: None when the broker has stored that, or `DeliveryLost`."""
        raise NotImplementedError

    async def sure(self, locks: Sequence[Lock], seconds: float) -> None:
        """Make sure of *locks*: on return each is ours for *seconds* more (or as long as the broker locks for), or lost.

        Raises:
            BrokerUnavailable: that cannot be found out in time.
        """
        raise NotImplementedError

    @property
    def owned_until(self) -> float:
        """Until when all that is in hand (acquired, neither accepted nor released) is certainly ours, at least.

        0 while some of it is adrift, infinity with nothing in hand.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Tell the brokers what is accepted, hand back all else, and acquire nothing more; before `run` is cancelled."""
        raise NotImplementedError
