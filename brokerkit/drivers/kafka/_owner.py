"""What a reader owns: settling it, handing it back, and what happens when partitions come and go."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import anyio

from ...address import AnyQueue, AnyTopic
from ...driver import Delivery, Revoked, Settlement, Source
from ...errors import BrokerError, BrokerUnavailable, ConfigError, DeliveryLost, NotFound
from ._claim import Claim, Lease, lease_of
from ._cluster import PAUSE
from ._commit import Commits
from ._context import Context
from ._copies import MARGIN, Copies, Job
from ._reader import Reader

logger = logging.getLogger("brokerkit")

PATIENCE: Final = 60.0
"""Least seconds that a partition waits for what runs before it moves: a member that lives is not hurried."""
STORING: Final = 5.0
"""Most seconds that a partition which is let go waits for its last note to be stored."""


class Owner(Reader):
    """Settles what it hands out, and is told by its group what is its own."""

    def __init__(
        self, context: Context, address: AnyTopic | AnyQueue, source: Source, prefetch: int, revoked: Revoked
    ) -> None:
        super().__init__(context, address, source, prefetch, revoked)
        self._copies: Copies[Lease] | None = None

    @property
    def claims(self) -> Mapping[int, Claim]:
        """The partitions that it has, by number."""
        return self._claims

    @property
    def topic(self) -> str:
        """The name of what it reads."""
        return self._name

    @property
    def owned_until(self) -> float:
        """Until when what it holds is certainly its own; an ephemeral reader owns nothing that others might take."""
        return math.inf if self._group is None else self._group.owned_until

    # ------------------------------------------------------------------ settling

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item, then acknowledge its delivery; one result each."""
        held = self._held
        confirm = confirm or self._doubtful()
        results: list[BrokerError | None] = []
        touched: dict[Claim, None] = {}
        jobs: dict[int, Job[Lease]] = {}
        pop = held.pop
        for item in items:
            lease: Lease = item.delivery.token  # type: ignore[assignment]
            if item.publish:
                results.append(self._settle_copies(len(results), item, jobs))
            elif pop(lease, None) is None:
                results.append(_unheld(lease))
            elif lease.job is not None:
                held[lease] = item.delivery
                jobs[len(results)] = lease.job
                results.append(None)
            else:
                lease.settled = True
                claim = lease.claim
                claim.tracker.done(lease.offset)
                touched[claim] = None
                results.append(None)
        if touched:
            self._done(touched)
        if jobs:
            await asyncio.wait([job.future for job in jobs.values()])
            for index, job in jobs.items():
                results[index] = job.future.result()
        if confirm and self._commits is not None and any(result is None for result in results):
            await self._confirm(items, results, self._commits)
        return results

    def _settle_copies(self, index: int, item: Settlement, jobs: dict[int, Job[Lease]]) -> BrokerError | None:
        """Begin to settle an item that publishes; return why that cannot be done."""
        lease = item.delivery.token
        if lease not in self._held or not isinstance(lease, Lease):
            return _unheld(lease)
        if self._copies is None:
            return ConfigError(f"a reader of {self._name} without a group settles nothing")
        jobs[index] = lease.job or self._copies.add(lease, item.publish)
        return None

    def _copied(self, lease: Lease) -> None:
        """A delivery is done whose copies are stored."""
        lease.claim.tracker.done(lease.offset)
        self._done((lease.claim,))

    async def _sure(self, leases: Sequence[Lease]) -> None:
        """Return when *leases* are certainly ours for as long as it takes to send something, or certainly lost.

        Raises:
            BrokerUnavailable: that cannot be found out now.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._context.settings.timeout
        margin = min(MARGIN, self._session / 4)
        while self.owned_until < loop.time() + margin:
            if not any(lease in self._held for lease in leases):
                return
            if loop.time() >= end:
                raise BrokerUnavailable("the group's coordinator does not answer: this may belong to others by now")
            await asyncio.sleep(PAUSE)

    def _done(self, claims: Iterable[Claim]) -> None:
        """Something of *claims* is done."""
        commits = self._commits
        if commits is not None:
            for claim in claims:
                commits.touch(claim)
            if not self._held:
                commits.eagerly()
        for claim in claims:
            if claim.standing:
                self._freed(claim)
                self._blocked = True
        if self._blocked:
            self._wake()

    async def _confirm(self, items: Sequence[Settlement], results: list[BrokerError | None], commits: Commits) -> None:
        """Wait until what was settled is stored."""
        failure: BrokerError | None = None
        try:
            await commits.stored()
        except NotFound as error:  # what it was about was deleted: nobody has it any more
            failure = DeliveryLost()
            failure.__cause__ = error
        except BrokerError as error:
            failure = error
        for index, item in enumerate(items):
            if results[index] is None:
                lost = lease_of(item.delivery).claim.lost
                results[index] = DeliveryLost(published=bool(item.publish)) if lost else failure

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back, uncounted."""
        released = self._hand_back(deliveries)
        self._wake()
        if released and self._commits is not None:
            await self._commits.stored()

    def _hand_back(self, deliveries: Iterable[Delivery]) -> bool:
        """Let *deliveries*, if they are held, wait again; return whether one was."""
        released = False
        for delivery in deliveries:
            lease = delivery.token
            if isinstance(lease, Lease) and lease.job is None and self._held.pop(lease, None) is not None:
                lease.claim.hand_back(lease, delivery)
                self._news[lease.claim] = None
                self._touch(lease.claim)
                released = True
        return released

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep the failed attempts of a delivery."""
        lease = delivery.token
        if lease not in self._held or not isinstance(lease, Lease):
            if (lost := _unheld(lease)) is not None:
                raise lost
            return
        lease.claim.tracker.hold(lease.offset, attempts)
        self._touch(lease.claim)
        if self._commits is not None:
            await self._commits.stored()
            if lease.claim.lost:
                raise DeliveryLost

    # ------------------------------------------------------------------ what is ours

    def _claim(self, number: int, base: int, note: str) -> Claim:
        """Begin to read partition *number*."""
        assert self._fetcher is not None
        end = None if self._ends is None else self._ends[number] if number < len(self._ends) else 0
        claim = self._claims[number] = self._make(number, base, note, end)
        self._fetcher.begin(number, claim.start)
        self._news[claim] = None
        return claim

    def _make(self, number: int, base: int, note: str, end: int | None) -> Claim:
        return Claim(self._address, number, base, note, self._context.time, asyncio.get_running_loop().time, end)

    def assigned(self, partitions: Mapping[int, tuple[int, str] | None]) -> None:
        """*partitions* are ours from now on, with what is stored of each."""
        for number, place in partitions.items():
            if number in self._claims:
                continue
            base, note = place or (0, "")
            claim = self._claim(number, base, note)
            claim.anew = place is None
        self._wake()

    def taken(self, partitions: Collection[int]) -> None:
        """Others wait for *partitions*: let them go; what runs is waited for."""
        claims = [self._claims[number] for number in partitions if number in self._claims]
        claims = [claim for claim in claims if not claim.revoking]
        for claim in claims:
            claim.revoking = True
        waiting = [delivery for delivery in self._fetched if lease_of(delivery).claim.revoking]
        self._hand_back(waiting)
        self._forget_fetched()
        busy = {lease_of(delivery).claim for delivery in self._held.values()}
        # Each that is busy by itself: none waits for the handlers of another.
        for part in ([claim for claim in claims if claim not in busy], *([claim] for claim in claims if claim in busy)):
            if part and self._telling is not None:
                self._telling.start_soon(self._run, functools.partial(self._move, part))
        self._wake()

    async def _move(self, claims: list[Claim]) -> None:
        """Let *claims* go when the program has let go of what it has of them."""
        with anyio.move_on_after(max(self._session, PATIENCE)) as patience:
            if held := self._held_of(claims):
                await self._tell(held)
        if self._copies is not None and (under_way := self._copies.under_way(lambda lease: lease.claim in claims)):
            await asyncio.wait(under_way)
        left = self._held_of(claims)
        if patience.cancelled_caught:
            for delivery in left:  # it may be what hangs: that counts
                self._held.pop(delivery.token, None)
        else:
            self._hand_back(left)
        await self._let_go(claims)

    def _held_of(self, claims: Collection[Claim]) -> list[Delivery]:
        return [delivery for delivery in self._held.values() if lease_of(delivery).claim in claims]

    async def _let_go(self, claims: Sequence[Claim]) -> None:
        """Give *claims*, of which nothing is in hand, to others, when it is stored how far they are."""
        group, commits = self._group, self._commits
        assert group is not None
        assert commits is not None
        await self._store(claims, STORING)
        claims = [claim for claim in claims if not claim.gone]
        for claim in claims:
            claim.lost = commits.concerns([claim])  # who waits for a confirmation must not be told that it is stored
            self._forget(claim)
        # A commit that is under way still is of this generation: none of the next one may follow it.
        commits.drop(claims)
        if claims:
            group.let_go([claim.number for claim in claims])
        self._wake()

    async def _store(self, claims: Collection[Claim], patience: float) -> None:
        """Have everything of *claims* stored, within *patience* seconds."""
        commits = self._commits
        assert commits is not None
        with anyio.move_on_after(patience):
            while commits.concerns(claims):
                try:
                    await commits.stored()
                except BrokerError:
                    await asyncio.sleep(2 * PAUSE)

    def _forget(self, claim: Claim) -> None:
        """Have nothing to do with *claim* any more."""
        claim.gone = True
        self._news.pop(claim, None)
        if self._claims.get(claim.number) is claim:
            del self._claims[claim.number]
            if self._fetcher is not None:
                self._fetcher.stop(claim.number)

    def lost(self, partitions: Collection[int]) -> None:
        """*partitions* belong to others by now: tell the program what it has lost."""
        self._drop([self._claims[number] for number in partitions if number in self._claims])

    def _refused(self, claims: list[Claim]) -> None:
        """Positions of *claims* were not stored, since they belong to others by now."""
        self._drop(claims)

    def _drop(self, claims: Collection[Claim]) -> None:
        """Have nothing more of *claims* in hand, and tell the program what it had."""
        if not claims:
            return
        waiting = {delivery.token for delivery in self._fetched}
        for claim in claims:
            claim.lost = True
            self._forget(claim)
        lost: list[Delivery] = []
        for delivery in self._held_of(claims):
            del self._held[delivery.token]
            if delivery.token not in waiting:
                lost.append(delivery)
        self._forget_fetched()
        if self._commits is not None:
            self._commits.drop(claims)
        if lost and self._telling is not None:
            self._telling.start_soon(self._tell, lost)
        self._wake()

    def _forget_fetched(self) -> None:
        """Keep of what was fetched only what is still held."""
        kept = [delivery for delivery in self._fetched if delivery.token in self._held]
        self._fetched.clear()
        self._fetched.extend(kept)

    def truncated(self, partition: int, at: int, to: int) -> None:
        """The log of *partition* has lost its end, from *to* on: what was read of that is another record by now."""
        claim = self._claims.get(partition)
        if claim is None:
            return
        base = min(claim.tracker.base, to)
        logger.error(
            "%s[%d] was cut at %d, behind which %d records were read: it is read again from %d on",
            self._name,
            partition,
            to,
            at - to,
            base,
        )
        self._drop([claim])
        if claim.revoking and self._group is not None:
            self._group.let_go([partition])  # whoever owns it next finds the same
        else:
            self._touch(self._claim(partition, base, ""))

    def purged(self, partition: int, start: int) -> None:
        """Everything of *partition* below *start* was removed from this queue: nothing of it is begun any more."""
        claim, fetcher = self._claims.get(partition), self._fetcher
        if claim is not None and fetcher is not None and start > claim.tracker.base:
            claim.purged(fetcher.skip(partition, start), start)
            self._touch(claim)
            self._news[claim] = None
            self._wake()

    def late(self) -> None:
        """Nobody has taken over what is left, or the program is about to hear what was taken: go on behind that."""
        if self._telling is not None:
            self._telling.start_soon(self._go_on)

    async def _go_on(self) -> None:
        # What was begun before this, telling the program of what it has lost, has taken its first step: it has heard.
        assert self._group is not None
        logger.warning(
            "%s: group %s heard nothing of this member for %.3g s; it began nothing meanwhile",
            self._name,
            self._source.group,
            self._session,
        )
        self._group.go_on()
        self._wake()


def _unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
