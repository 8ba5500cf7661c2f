"""Faults to order: what a test may do to one connection."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import BrokerError


class Faults:
    """What goes wrong on one connection to a memory server.  Everything else in the process goes on as it was."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.dead = False
        """Whether `cut` was called."""
        self.frozen = False
        """Whether `freeze` was called, and `thaw` not yet."""
        self.away = False
        """Whether `disconnect` was called, and `reconnect` not yet."""
        self.replies = 0
        """How many answers to publishing will be lost."""
        self.publishes: list[BrokerError] = []
        """What the next records will fail with."""
        self.settles: list[BrokerError] = []
        """What the next settlements will fail with."""

    def cut(self) -> None:
        """End the connection for good, as ``kill -9`` of its process would: nothing is released, every call raises."""
        self.dead = True
        self._changed()

    def freeze(self) -> None:
        """Stop the connection as ``SIGSTOP`` would: nothing is renewed or delivered, its calls wait."""
        self.frozen = True
        self._changed()

    def thaw(self) -> None:
        """Let it run on after `freeze`.  What others took over meanwhile is lost."""
        self.frozen = False
        self._changed()

    def disconnect(self) -> None:
        """Lose the network: calls raise `BrokerUnavailable` and the leases of its consumers run out."""
        self.away = True
        self._changed()

    def reconnect(self) -> None:
        """Mend what `disconnect` broke.  Consumers of before stay broken and have to be entered anew."""
        self.away = False
        self._changed()

    def lose_replies(self, n: int = 1) -> None:
        """Store what the next *n* calls of publish bring, and lose the answers: `PublishUnknown`."""
        self.replies += n
        self._changed()

    def fail_publishes(self, error: BrokerError, n: int = 1) -> None:
        """Let the next *n* records fail with *error*, unstored."""
        self.publishes += [error] * n
        self._changed()

    def fail_settles(self, error: BrokerError, n: int = 1) -> None:
        """Let the next *n* settlements fail with *error*: nothing is stored, the deliveries stay unsettled."""
        self.settles += [error] * n
