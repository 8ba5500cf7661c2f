"""The rule about what comes alone, as all drivers keep it.

A record that was delivered several times without an outcome may be what ends its consumers, so nothing else shall be in hand
meanwhile.  Once the consumer has lived with it for a lease, it does not: it is *proven*, and holds up nothing any more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence


class Lone:
    """What of all that a consumer holds has come alone.

    Whatever leaves *held* is forgotten by itself.  *wake* is called when others may come although nothing was settled.
    """

    __slots__ = ("_fresh", "_held", "_proven", "_timer", "_wake", "active")

    def __init__(self, held: Mapping[object, object], wake: Callable[[], object]) -> None:
        self._held = held
        self._wake = wake
        self._fresh: object = None
        self._proven: list[object] = []
        self._timer: asyncio.TimerHandle | None = None
        self.active = False
        """Whether there may be anything: else nothing need be asked."""

    def came(self, token: object, lease: float = math.inf) -> None:
        """*token*, which is held, has come alone, and holds up others for *lease* seconds."""
        self.close()
        self._fresh = token
        self.active = True
        if lease < math.inf:
            self._timer = asyncio.get_running_loop().call_later(lease, self._prove)

    def holds_up(self) -> bool:
        """Return whether nothing else may come."""
        if self._fresh is not None:
            if self._fresh in self._held:
                return True
            self.close()
        self.active = bool(self.proven())
        return False

    def proven(self) -> Sequence[object]:
        """Return what is held that has come alone and holds up nothing any more."""
        if self._proven:
            self._proven = [token for token in self._proven if token in self._held]
        return self._proven

    def may_come(self) -> bool:
        """Return whether the next one may come: nothing is held but what is proven."""
        return len(self._held) == len(self.proven())

    def close(self) -> None:
        """Have no timer any more, and forget what is not proven."""
        self._fresh = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _prove(self) -> None:
        self._timer = None
        token, self._fresh = self._fresh, None
        if token in self._held:
            self._proven.append(token)
            self._wake()
