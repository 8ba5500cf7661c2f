"""Storing how far a reader is: positions with their notes, in the background.

One commit is under way at a time.  What is handed out is noted ahead of the program seeing it where that costs no waiting: the
commit is written to the connection first.  While many records flow, notes follow at a bounded rate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import Any, Final, Protocol

from ...errors import BrokerError, DeliveryLost
from ._claim import Claim

logger = logging.getLogger("brokerkit")

EVERY: Final = 0.4
"""Seconds after which what is done is stored, if nothing has done so before."""
APART: Final = 0.04
"""Seconds between commits on the average, while nobody waits for one."""
BURST: Final = 10
"""Commits that may follow each other at once after a quiet time."""
_AGAIN: Final = 0.1
_LONGEST: Final = 2.0


class Group(Protocol):
    """Where positions are stored."""

    async def commit(self, offsets: Mapping[int, tuple[int, str]], /, *, timeout: float) -> Mapping[int, BrokerError]:
        """Store positions with notes by partition; return what failed."""
        ...


class Commits:
    """What one member of a group has still to store."""

    def __init__(
        self,
        name: str,
        group: Group,
        timeout: float,
        spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        lost: Callable[[list[Claim]], None],
    ) -> None:
        self._name = name
        """Whose positions these are, for logs."""
        self._group = group
        self._timeout = timeout
        self._spawn = spawn
        self._lost = lost
        self._dirty: dict[Claim, None] = {}
        self._flying: dict[Claim, None] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._quiet: list[asyncio.Future[None]] = []
        self._busy = False
        self._soon = False
        """Whether a note is wanted as soon as the rate allows."""
        self._next = 0.0
        """When the next commit that nobody waits for may begin, were there no burst."""
        self._failures = 0
        self._rested = 0.0
        """Until when a coordinator that has failed is left alone, while nobody waits for it."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False
        self.unsent = False
        """Whether a commit is about to be written: let the event loop turn once."""
        self.problem: BrokerError | None = None
        """Why the last commit failed, if it did."""

    # ------------------------------------------------------------------ asking

    @property
    def pending(self) -> bool:
        """Whether something is not stored yet."""
        return bool(self._dirty or self._busy)

    def concerns(self, claims: Collection[Claim]) -> bool:
        """Return whether something of *claims* is not stored yet."""
        return any(claim in self._dirty or claim in self._flying for claim in claims)

    def touch(self, claim: Claim) -> None:
        """Have the position of *claim* stored soon."""
        if claim not in self._dirty:
            self._dirty[claim] = None
            if self._timer is None:
                self._arm(EVERY)

    def ahead(self, claims: Iterable[Claim]) -> None:
        """Have notes of *claims*, of which something is being handed out, written at once if the rate allows it."""
        self._dirty.update(dict.fromkeys(claims))
        self.eagerly()

    def eagerly(self) -> None:
        """Store what is there as soon as the rate allows."""
        if self._closed or not self._dirty:
            return
        self._soon = True
        if self._busy:
            return
        now = asyncio.get_running_loop().time()
        wait = max(self._next - BURST * APART, self._rested) - now
        if wait <= 0:
            self._next = max(self._next, now) + APART
            self._fly()
        elif self._timer is None or self._timer_at > now + wait + APART / 4:
            self._arm(wait)

    def stored(self) -> asyncio.Future[None]:
        """Store everything that is there by now; the future has a result when that is so."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(DeliveryLost("the consumer was left before this was stored"))
        elif not self.pending:
            future.set_result(None)
        else:
            self._waiting.append(future)
            if not self._busy:
                self._fly()
        return future

    async def quiet(self) -> None:
        """Return when the commit that is under way is answered."""
        if self._busy:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._quiet.append(future)
            await future

    def drop(self, claims: Iterable[Claim]) -> None:
        """Store nothing of *claims* any more: they are gone."""
        for claim in claims:
            self._dirty.pop(claim, None)

    def close(self) -> None:
        """Store nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._dirty.clear()
        waiting, self._waiting = self._waiting, []
        _tell(waiting, DeliveryLost("the consumer was left before this was stored"))
        self._tell_quiet()

    # ------------------------------------------------------------------ storing

    def _arm(self, wait: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer_at = loop.time() + wait
        self._timer = loop.call_at(self._timer_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._dirty and not self._closed:
            self.eagerly()

    def _fly(self) -> None:
        self._busy = self.unsent = True
        self._spawn(self._flight)

    async def _flight(self) -> None:
        """Store everything that is there."""
        self._soon = False
        waiting, self._waiting = self._waiting, []
        claims = {claim.number: claim for claim in self._dirty if not claim.gone}
        self._dirty.clear()
        self._flying = dict.fromkeys(claims.values())
        failure: BrokerError | None = None
        stored = False
        try:
            failed: Mapping[int, BrokerError] = {}
            if claims:
                notes = {number: claim.note() for number, claim in claims.items()}
                self.unsent = False
                failed = await self._group.commit(notes, timeout=self._timeout)  # written before it waits
                stored = len(failed) < len(claims)
            failure = self._take_in(claims, failed)
        except BrokerError as error:
            failure = self._take_in(claims, dict.fromkeys(claims, error))
        except Exception as error:
            logger.exception("%s: storing positions has broken", self._name)
            broken = BrokerError(f"the driver failed: {type(error).__name__}")
            broken.__cause__ = error
            failure = self._take_in(claims, dict.fromkeys(claims, broken))
        except BaseException:
            _tell(waiting, DeliveryLost("the consumer was left before this was stored"))
            raise
        finally:
            self._busy = self.unsent = False
            self._flying = {}
            self._log(failure, stored=stored)
            self._failures = 0 if failure is None else min(8, self._failures + 1)
            if failure is not None:
                self._rested = asyncio.get_running_loop().time() + min(_LONGEST, _AGAIN * 2**self._failures)
            self._tell_quiet()
        _tell(waiting, failure)
        if self._closed:
            return
        if self._waiting:
            self._fly()
        elif self._soon:
            self.eagerly()
        elif self._dirty and self._timer is None:
            self._arm(EVERY)

    def _take_in(self, claims: Mapping[int, Claim], failed: Mapping[int, BrokerError]) -> BrokerError | None:
        """Take note of what was not stored; return why, unless that was lost."""
        lost: list[Claim] = []
        failure: BrokerError | None = None
        for number, error in failed.items():
            claim = claims.get(number)
            if claim is None or claim.gone:
                continue
            if isinstance(error, DeliveryLost):
                lost.append(claim)
            else:
                failure = failure or error
                self.touch(claim)
        if lost:
            self._lost(lost)
        return failure

    def _log(self, failure: BrokerError | None, *, stored: bool) -> None:
        """Keep *failure* for health, and log each cause once."""
        if failure is not None and str(failure) != str(self.problem):
            logger.warning("%s: what is done is not stored yet: %s", self._name, failure)
        elif failure is None and self.problem is not None and stored:
            logger.info("%s: what is done is stored again", self._name)
        if failure is not None or stored:
            self.problem = failure

    def _tell_quiet(self) -> None:
        quiet, self._quiet = self._quiet, []
        _tell(quiet, None)


def _tell(waiting: Iterable[asyncio.Future[None]], error: BrokerError | None) -> None:
    for future in waiting:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            # One of its own for each: a traceback grows with every raise.
            copy = type(error)(*error.args)
            copy.__cause__ = error.__cause__
            future.set_exception(copy)
            future.exception()  # nobody may wait for it any more
