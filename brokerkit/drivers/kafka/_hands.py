"""What a member of a group has in its hands, and until when it may believe that nobody else has it.

A broker may give partitions of ours to others at the earliest

* *session* seconds after it received the last request of ours, so counted from when that was sent;
* if we do not come again, `REBALANCE` sessions after a rebalance has begun: signs of life help only for so long.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, Protocol

from ...errors import BrokerError
from ._assign import Claim, Share

logger = logging.getLogger("brokerkit")

REBALANCE: Final = 2.0
"""Sessions that a rebalance waits for members that live and do not come again; it waits a session for those that do not."""


class Told(Protocol):
    """Who takes part.  None of these may wait."""

    def assigned(self, partitions: Mapping[int, tuple[int, str] | None], /) -> None:
        """Take *partitions* in hand, each with the position that is stored and its note; None where nothing is."""
        ...

    def taken(self, partitions: Collection[int], /) -> None:
        """Finish with *partitions*, for which others wait, and call `Group.let_go`."""
        ...

    def lost(self, partitions: Collection[int], /) -> None:
        """Drop *partitions*: they belong to others by now, and no commit of them can succeed."""
        ...

    def late(self) -> None:
        """Call `Group.go_on` when the program has heard what is lost.

        Signs of life came too late for a while, or membership was lost: until then nothing is begun.
        """
        ...

    def fail(self, error: BrokerError, /) -> None:
        """Learn that it cannot go on."""
        ...


class Hands:
    """The partitions of one member."""

    def __init__(self, group: str, session: float, told: Told) -> None:
        self.owned_until = -math.inf
        """Until when what is held is certainly our own, on the loop's clock."""
        self.held: dict[int, int] = {}
        """What is held, each with a number of its own: partitions come and go."""
        self.leaving: set[int] = set()
        self.unplaced: set[int] = set()
        """What nobody was told of yet: where to begin is not known."""
        self.generation = -1
        """Of the share that this comes from."""
        self.spare = False
        """Whether there are more members than partitions, and none is left for this one."""
        self._group = group
        self._session = session
        self._told = told
        self._numbers = itertools.count()
        self._proven = self._calm = -math.inf
        self._late = False

    def claim(self, count: int) -> Claim:
        """Return what is held, for the leader; *count* partitions are known."""
        return Claim(frozenset(self.held), frozenset(self.leaving), self.generation, count)

    def numbered(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the numbers of *partitions*, -1 for what is not held."""
        return {partition: self.held.get(partition, -1) for partition in partitions}

    def has(self, partition: int, number: int) -> bool:
        """Return whether *partition* is held, and was all the time since it had *number*."""
        return self.held.get(partition) == number

    # ------------------------------------------------------------------ coming and going

    def take(self, share: Share, generation: int) -> bool:
        """Hold *share*, find out what others wait for, and return whether something was let go by that."""
        self.generation = generation
        self.spare = not share.partitions and not share.moving
        surplus = self.held.keys() - share.partitions - self.leaving
        for partition in share.partitions - self.held.keys():
            self.held[partition] = next(self._numbers)
            self.unplaced.add(partition)
        unknown = self.let_go(surplus & self.unplaced)
        surplus &= self.held.keys()
        self.leaving |= surplus
        if surplus:
            self.tell(self._told.taken, sorted(surplus))
        return unknown

    def placed(self, found: Mapping[int, tuple[int, str] | None], numbers: Mapping[int, int]) -> None:
        """Tell where to begin in what is held still, of what had these *numbers*."""
        mine = {partition: found[partition] for partition, number in numbers.items() if self.has(partition, number)}
        self.unplaced -= mine.keys()
        if mine:
            self.tell(self._told.assigned, mine)

    def let_go(self, partitions: Collection[int]) -> bool:
        """Hold *partitions* no more; return whether there was something to let go."""
        gone = [partition for partition in partitions if partition in self.held]
        for partition in gone:
            del self.held[partition]
            self.leaving.discard(partition)
            self.unplaced.discard(partition)
        return bool(gone)

    def lose(self) -> None:
        """Hold nothing, since it belongs to others, and have that told."""
        lost = [partition for partition in self.held if partition not in self.unplaced]
        self.drop()
        if lost:
            self._late = True
            self.tell(self._told.lost, lost)
            self.tell(self._told.late)

    def drop(self) -> None:
        """Hold nothing."""
        self.held.clear()
        self.leaving.clear()
        self.unplaced.clear()
        self.generation = -1
        self.owned_until = self._proven = self._calm = -math.inf

    # ------------------------------------------------------------------ believing in it

    def prove(self, sent: float, *, calm: bool) -> bool:
        """Take note that a request *sent* at that time was a member's; return whether that says anything about now.

        *calm*: no rebalance had begun before it was received.
        """
        if calm:
            self._calm = max(self._calm, sent)
        now = asyncio.get_running_loop().time()
        until = min(sent + self._session, self._calm + REBALANCE * self._session)
        if until <= now:
            return False
        self._proven = max(self._proven, until)
        if self._late:
            return True
        if now >= self.owned_until and len(self.held) > len(self.unplaced):
            # The program begins nothing any more: it must not go on before it has heard what was lost.
            self._late = True
            self.tell(self._told.late)
        else:
            self.owned_until = self._proven
        return True

    def go_on(self) -> None:
        """Begin what is held again."""
        self._late = False
        self.owned_until = self._proven

    def tell(self, what: Callable[..., None], *args: object) -> None:
        """Call one of the methods of who takes part: its failures are its own."""
        try:
            what(*args)
        except Exception:
            logger.exception("group %s: the consumer failed to take note", self._group)
