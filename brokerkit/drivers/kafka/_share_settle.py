"""What a consumer of a share group does with what it has handed out: settling it, handing it back, losing it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence

from ...address import AnyQueue
from ...driver import Delivery, Revoked, Settlement
from ...errors import BrokerError, DeliveryLost
from ...events import PartitionPaused, PartitionResumed
from ._context import Context
from ._copies import MARGIN, Copies, Job
from ._engine import Terms
from ._rescue import Lease
from ._share_locks import Lock
from ._share_reader import HANDING_BACK, ShareReader

logger = logging.getLogger("brokerkit")


class ShareOwner(ShareReader):
    """Settles what it hands out, and is told what is its own."""

    def __init__(self, context: Context, queue: AnyQueue, prefetch: int, terms: Terms, revoked: Revoked) -> None:
        super().__init__(context, queue, prefetch, terms, revoked)
        self._copies: Copies[Lease] | None = None

    @property
    def owned_until(self) -> float:
        """Until when what it holds is certainly its own."""
        return 0.0 if self._share is None else self._share.owned_until

    # ------------------------------------------------------------------ settling

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item, then acknowledge its delivery; one result each."""
        held, leases, share = self._held, self._leases, self._share
        now = asyncio.get_running_loop().time()
        results: list[BrokerError | None] = []
        jobs: dict[int, Job[Lease]] = {}
        doubtful: dict[int, Lease] = {}
        freed = False
        for item in items:
            lease = item.delivery.token
            index = len(results)
            results.append(None)
            if not isinstance(lease, Lease) or lease not in held or share is None or self._copies is None:
                results[index] = _unheld(lease)
                if confirm and results[index] is None and isinstance(lease, Lease):
                    doubtful[index] = lease  # it was settled before, and that may not be stored yet
            elif lease.job is not None or item.publish:
                jobs[index] = lease.job or self._copies.add(lease, item.publish)
            elif 0.0 < lease.lock.until <= now:
                self._overdue(lease)
                results[index] = DeliveryLost()
            else:
                del held[lease]
                del leases[lease.lock]
                lease.settled = freed = True
                adrift = lease.lock.until <= now  # others may have it: then it is known later whether this counts
                share.accept(lease.lock)
                if confirm or adrift:
                    doubtful[index] = lease
        if freed:
            self._freed()
        if jobs:
            await asyncio.wait([job.future for job in jobs.values()])
            for index, job in jobs.items():
                results[index] = job.future.result()
                overdue = job.lease.lock.until <= asyncio.get_running_loop().time()
                if results[index] is None and (confirm or overdue):  # it may be lost still
                    doubtful[index] = job.lease
        if doubtful:
            await self._confirm(items, results, doubtful)
        return results

    def _overdue(self, lease: Lease) -> None:
        """Drop *lease*, whose time is up, although nobody has noticed yet: if it is not lost after all, it comes again."""
        self._held.pop(lease, None)
        if self._returns is not None:
            self._returns.put([(lease, lease.copy(counted=True))])
        self._freed()

    async def _confirm(
        self, items: Sequence[Settlement], results: list[BrokerError | None], doubtful: dict[int, Lease]
    ) -> None:
        """Wait until it is known what has become of what was accepted."""
        share = self._share
        if share is None:
            return
        answers = {index: share.confirmed(lease.lock) for index, lease in doubtful.items()}
        await asyncio.wait(list(answers.values()))
        for index, answer in answers.items():
            failure = answer.result()
            if isinstance(failure, DeliveryLost):
                doubtful[index].settled = False
                failure = DeliveryLost(published=bool(items[index].publish))
            results[index] = failure

    async def _sure(self, leases: Sequence[Lease]) -> None:
        """Return when *leases* are certainly ours for as long as it takes to send something, or lost.

        Raises:
            BrokerUnavailable: that cannot be found out now.
        """
        if self._share is not None and leases:
            await self._share.sure([lease.lock for lease in leases], MARGIN)

    def _copied(self, lease: Lease) -> None:
        """A delivery is done whose copies are stored."""
        self._leases.pop(lease.lock, None)
        if self._share is not None:
            self._share.accept(lease.lock)
        self._freed()

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back, uncounted."""
        stored = self._hand_back(deliveries, HANDING_BACK)
        self._freed()
        if stored is not None:
            await asyncio.wait([stored])

    def _hand_back(self, deliveries: Sequence[Delivery], patience: float) -> asyncio.Future[None] | None:
        """Have those of *deliveries* put back that are held; return what ends with that."""
        leases: list[Lease] = []
        for delivery in deliveries:
            lease = delivery.token
            if isinstance(lease, Lease) and lease.job is None and self._held.pop(lease, None) is not None:
                leases.append(lease)
        return self._put_back(leases, patience)

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep nothing: a queue's message is settled by its retry."""
        if delivery.token not in self._held and (lost := _unheld(delivery.token)) is not None:
            raise lost

    # ------------------------------------------------------------------ what is ours

    def lost(self, locks: Sequence[Lock]) -> None:
        """Others may have *locks* by now: tell the program what it has lost."""
        leases = [lease for lock in locks if (lease := self._leases.get(lock)) is not None]
        self._drop(leases)
        self._revoke(leases)
        self._freed()

    def regained(self, locks: Sequence[Lock]) -> None:
        """*locks* were adrift and are ours again, which the broker has counted."""
        rescued: list[Lease] = []
        taken: list[Lease] = []
        for lock in locks:
            lease = self._leases.get(lock)
            if lease is None or (self._returns is not None and lease in self._returns):
                continue
            if lease in self._held:
                if lock.count >= self._terms.limit and lease.job is None:
                    taken.append(lease)
            elif lock.count >= self._threshold:
                rescued.append(lease)
        if rescued:
            self._drop(rescued)
            self._leases.update((lease.lock, lease) for lease in rescued)
            self._rescue(rescued)
        if taken:
            # The next time that its connection breaks, the broker drops it: whoever runs it must not be its last hope.
            self._revoke(taken)
            if self._returns is not None:
                self._returns.put([(lease, lease.copy(counted=True)) for lease in taken], urgent=True)
        self._freed()

    def _revoke(self, leases: Collection[Lease]) -> None:
        """Have *leases* held no more, and tell the program of those that are."""
        lost = [delivery for lease in leases if (delivery := self._held.pop(lease, None)) is not None]
        if lost and self._telling is not None:
            self._telling.start_soon(self._tell, lost)

    def damaged(self, error: BrokerError) -> None:
        """Something cannot be read, by nobody: it is kept from being dropped, and everything else goes on."""
        logger.error("%s: %s", self._name, error)

    def stalled(self, partition: int, ahead: int, window: int) -> None:
        """The oldest record in hand keeps *partition* from going on soon."""
        logger.warning(
            "%s[%d]: the oldest message in hand has %d of the %d behind it that the broker hands out meanwhile; then the "
            "partition stands until it is settled",
            self._name,
            partition,
            ahead,
            window,
        )
        self._context.emit(PartitionPaused(address=self._name, partition=partition))

    def resumed(self, partition: int) -> None:
        """What `stalled` said of *partition* is over."""
        self._context.emit(PartitionResumed(address=self._name, partition=partition))

    def fail(self, error: BrokerError) -> None:
        """Let `receive`, or entering, raise *error* from now on."""
        super().fail(error)
        self._make_room()


def _unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
