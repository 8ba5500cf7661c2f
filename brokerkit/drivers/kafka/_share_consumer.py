"""`ShareConsumer`: takes records of a queue as a member of its share group, in competition with others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

import anyio

from ...address import AnyQueue
from ...driver import Revoked
from ...errors import BrokerError
from ._context import Context
from ._copies import Copies
from ._engine import Terms
from ._rescue import Lease, Returns
from ._share import Share
from ._share_member import ShareMember
from ._share_settle import ShareOwner

logger = logging.getLogger("brokerkit")

LEAVING: Final = 8.0
"""Most seconds that leaving waits for settlements that store something, and for copies of what is in hand: half of it each.

What is given up half-way may be there twice.
"""
SIGNING_OFF: Final = 1.0
"""Most seconds that leaving waits for the group to know."""
_QUIET: Final = 1.0
"""Seconds to wait at once until nothing is under way."""


class ShareConsumer(ShareOwner):
    """A consumer of one queue, and its context manager."""

    def __init__(self, context: Context, queue: AnyQueue, prefetch: int, revoked: Revoked, terms: Terms) -> None:
        super().__init__(context, queue, prefetch, terms, revoked)
        self._member = ShareMember(context.cluster, self._name, self._name, self.fail)

    def __repr__(self) -> str:
        return f"<ShareConsumer {self._name} in_flight={len(self._held)}>"

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes, or goes, if that is so."""
        share, returns = self._share, self._returns
        if self._error is not None or share is None or returns is None:
            return self._error
        return share.problem or returns.problem or self._member.problem

    # ------------------------------------------------------------------ for who counts what is left

    @property
    def group(self) -> str:
        """What Kafka calls its group."""
        return self._name

    @property
    def member(self) -> str:
        """What Kafka calls it."""
        return self._member.id

    def holding(self) -> Iterable[tuple[int, int, bool]]:
        """Return partition and offset of all that is in hand, and whether it waits for its time."""
        later = {id(lease) for *_, lease in self._later}
        return [(lock.partition, lock.offset, id(lease) in later) for lock, lease in self._leases.items()]

    def going(self) -> int:
        """Return how many are done of which the broker has not said that it knows."""
        return 0 if self._share is None else self._share.going()

    # ------------------------------------------------------------------ life

    async def _enter(self) -> None:
        context, name = self._context, self._name
        timeout = context.settings.timeout
        self._spawn(self._member.run)
        # A group with a member is nothing that another process, which reserves it at the same moment, can set back.
        await self._member.join(timeout=timeout)
        terms = self._terms
        self._share = share = Share(
            context.cluster,
            name,
            name,
            self._member.id,
            self,
            timeout=timeout,
            lock=terms.lock,
            window=terms.window,
            widens=terms.widens,
        )
        self._returns = Returns(
            name, context.outboxes, share, terms.limit, self._spawn, self._forget, self._put_back_some
        )
        self._copies = Copies(context.outboxes, self._sure, self._held, timeout, self._spawn, self._copied)
        self._entered = True
        self._spawn(share.run)

    # ------------------------------------------------------------------ leaving

    async def _leave(self) -> None:
        """Store what is settled, hand back what is not, and leave the group."""
        self._leaving = True
        self._make_room()
        with anyio.CancelScope(shield=True):
            if self._share is not None:
                with anyio.move_on_after(LEAVING):
                    await self._empty()
                await self._share.close()
            await self._member.leave(timeout=SIGNING_OFF)

    async def _empty(self) -> None:
        """Have nothing in hand any more."""
        copies, returns, share = self._copies, self._returns, self._share
        if copies is None or returns is None or share is None:
            return
        if not await returns.possible():
            return
        with anyio.move_on_after(LEAVING / 2):
            if under_way := copies.under_way(lambda _: True):
                await asyncio.wait(under_way)
        fresh = True
        while fresh:
            self._sort(share.take(share.untaken()))
            self._put_back_all(returns)
            if stored := returns.hurry(LEAVING / 2):
                await asyncio.wait(stored)
            # What was asked for before may come still: it would be handed back counted, or be rescued and come twice.
            quiet = await share.quiet(_QUIET)
            fresh = not quiet or share.untaken() > 0 or returns.under_way or bool(self._idle(returns))

    def _idle(self, returns: Returns) -> list[Lease]:
        """Return what is in hand, and neither being put back nor being settled."""
        return [lease for lease in self._leases.values() if lease not in returns and lease.job is None]

    def _put_back_all(self, returns: Returns) -> None:
        leases = self._idle(returns)
        for lease in leases:
            self._held.pop(lease, None)
        for waiting in (self._ready, self._suspects, self._later):
            waiting.clear()
        self._put_back(leases, LEAVING / 2)

    def _close(self) -> None:
        self._entered = False
        self._leaving = True
        for timer in (self._alarm, self._absence):
            if timer is not None:
                timer.cancel()
        self._lone.close()
        if self._copies is not None:
            self._copies.abort()
        if self._returns is not None:
            self._returns.abort()
        self._held.clear()
        self._leases.clear()
        for waiting in (self._ready, self._suspects, self._later):
            waiting.clear()
        self._wake()
