"""Settlements of one consumer, gathered and carried out by one task.

Whatever is added in one turn of the event loop goes to the driver in one call, so acknowledging each message by itself costs
no round trip each.  What the system could not store is tried again with jitter until the consumer is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from .address import Address
from .driver import Consumer, Delivery, Settlement
from .errors import BrokerError, BrokerUnavailable, Closed, DeliveryLost, NotFound
from .policy import backoff

logger = logging.getLogger("brokerkit")


class Watch(msgspec.Struct):
    """What to do when a settlement is carried out.

    *done* is called with None, or with the error after which it is given up.  *refused* is called instead when the system
    refuses what the settlement publishes; without it refusals are tried again too.  *once* gives up after the first error.
    """

    done: Callable[[BrokerError | None], None] | None = None
    refused: Callable[[BrokerError], None] | None = None
    once: bool = False
    failures: int = 0


class Settling:
    """Gathers what is to be settled, held and released on one consumer."""

    def __init__(
        self,
        consumer: Consumer,
        on_settled: Callable[[int], None],
        on_error: Callable[[Delivery, BrokerError], None],
        restore: Callable[[Address], Awaitable[bool]] | None = None,
    ) -> None:
        self._consumer = consumer
        self._on_settled = on_settled
        self._on_error = on_error
        self._restore = restore
        self._items: list[Settlement] = []
        self._watches: dict[int, Watch] = {}
        """By index in the items; most have none."""
        self._holds: list[tuple[Delivery, int]] = []
        self._releases: list[Delivery] = []
        self._confirm = False
        self._wake: asyncio.Future[None] | None = None
        self._idle: list[asyncio.Future[None]] = []
        self._later: dict[asyncio.TimerHandle, tuple[Settlement, Watch]] = {}
        self._waiting: set[asyncio.TimerHandle] = set()
        """Releases that failed and are tried again."""
        self._unreleased = 0
        self._busy = False
        self.closed = False

    def add(self, item: Settlement, watch: Watch | None = None, *, confirm: bool = False) -> None:
        """Have *item* settled soon."""
        if self.closed:
            self._lost(item, watch)
            return
        if watch is not None:
            self._watches[len(self._items)] = watch
        if confirm:
            self._confirm = True
        self._items.append(item)
        if self._wake is not None:
            self._stir()

    def hold(self, delivery: Delivery, attempts: int) -> None:
        """Have the driver told that *delivery* has failed *attempts* times and stays here."""
        self._holds.append((delivery, attempts))
        self._stir()

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Have *deliveries* handed back soon."""
        if deliveries and not self.closed:
            self._releases.extend(deliveries)
            self._stir()

    def _stir(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    async def run(self) -> None:
        """Carry everything out until cancelled.  Runs in one task."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not (self._items or self._holds or self._releases):
                    self._tell_idle()
                    self._wake = loop.create_future()
                    await self._wake
                await self._round()
        finally:
            self.close()

    async def _round(self) -> None:
        self._busy = True
        try:
            if self._holds:
                holds, self._holds = self._holds, []
                await self._hold_all(holds)
            if self._items:
                items, self._items = self._items, []
                watches, self._watches = self._watches, {}
                confirm, self._confirm = self._confirm, False
                await self._settle(items, watches, confirm)
            if self._releases:
                releases, self._releases = self._releases, []
                await self._release(releases)
        finally:
            self._busy = False

    async def _hold_all(self, holds: list[tuple[Delivery, int]]) -> None:
        for delivery, attempts in holds:
            try:
                await self._consumer.hold(delivery, attempts)
            except BrokerError as error:
                # Unless it is lost, only the count of failed attempts is at stake, should this process die before the next.
                self._on_error(delivery, error)

    async def _settle(self, items: list[Settlement], watches: dict[int, Watch], confirm: bool) -> None:
        results: Sequence[BrokerError | None]
        try:
            results = await self._consumer.settle(items, confirm=confirm)
        except BrokerError as error:
            results = [error] * len(items)
        except asyncio.CancelledError:
            for index, item in enumerate(items):
                self._lost(item, watches.get(index))
            raise
        except Exception as error:
            logger.exception("the driver failed to settle %d messages", len(items))
            unavailable = BrokerUnavailable(f"the driver failed: {type(error).__name__}")
            unavailable.__cause__ = error
            results = [unavailable] * len(items)
        if not any(results):
            self._on_settled(len(items))
            for watch in watches.values():
                if watch.done is not None:
                    watch.done(None)
            return
        missing: list[tuple[Settlement, Watch, NotFound]] = []
        for index, (item, result) in enumerate(zip(items, results, strict=True)):
            if isinstance(result, NotFound) and self._restore is not None and item.publish:
                missing.append((item, watches.get(index) or Watch(), result))
            else:
                self._apply(item, watches.get(index), result)
        while missing:
            item, watch, missed = missing[-1]
            try:
                restored = await self._restored(item)
            except asyncio.CancelledError:
                for late, waiting, _ in missing:
                    self._lost(late, waiting)
                raise
            missing.pop()
            if restored:
                self._again(item, watch)
            else:
                self._apply(item, watch, missed)

    async def _restored(self, item: Settlement) -> bool:
        """Create anew what *item* publishes to and has vanished; return whether that was of use."""
        if self._restore is None:
            return False
        targets: set[Address] = {record.address for record in item.publish}
        return any([await self._restore(address) for address in targets])

    def _apply(self, item: Settlement, watch: Watch | None, result: BrokerError | None) -> None:
        if result is None:
            self._on_settled(1)
        elif isinstance(result, (DeliveryLost, Closed)):
            if isinstance(result, Closed):  # nothing will ever be stored here: the message comes again elsewhere
                result = DeliveryLost("the connection was closed before this was settled")
            self._on_settled(1)
            self._on_error(item.delivery, result)
        elif watch is not None and watch.once:
            self._on_error(item.delivery, result)
        elif not result.retryable and watch is not None and watch.refused is not None:
            self._on_error(item.delivery, result)
            watch.refused(result)
            return
        else:
            self._on_error(item.delivery, result)
            self._again(item, watch or Watch())
            return
        if watch is not None and watch.done is not None:
            watch.done(result)

    def _again(self, item: Settlement, watch: Watch) -> None:
        watch.failures += 1
        loop = asyncio.get_running_loop()

        def retry() -> None:
            del self._later[handle]
            self.add(item, watch)

        handle = loop.call_later(backoff(watch.failures, longest=5.0), retry)
        self._later[handle] = (item, watch)

    async def _release(self, deliveries: list[Delivery]) -> None:
        try:
            await self._consumer.release(deliveries)
        except BrokerError as error:
            # They are still in hand, their leases renewed: nobody else would get them.
            self._on_error(deliveries[0], error)
            self._release_again(deliveries)
            return
        self._unreleased = 0
        self._on_settled(len(deliveries))

    def _release_again(self, deliveries: list[Delivery]) -> None:
        self._unreleased += 1

        def retry() -> None:
            self._waiting.discard(handle)
            self.release(deliveries)

        handle = asyncio.get_running_loop().call_later(backoff(self._unreleased, longest=5.0), retry)
        self._waiting.add(handle)

    async def flush(self) -> None:
        """Wait until everything added so far is carried out, or the consumer is gone."""
        while not self.closed and (
            self._items or self._holds or self._releases or self._busy or self._later or self._waiting
        ):
            idle = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            await idle

    def _tell_idle(self) -> None:
        idle, self._idle = self._idle, []
        for waiter in idle:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Give up what is left: the consumer is gone, so its deliveries belong to somebody else soon."""
        self.closed = True
        items, self._items = self._items, []
        watches, self._watches = self._watches, {}
        later, self._later = self._later, {}
        for handle in (*later, *self._waiting):
            handle.cancel()
        self._waiting.clear()
        for index, item in enumerate(items):
            self._lost(item, watches.get(index))
        for item, watch in later.values():
            self._lost(item, watch)
        self._tell_idle()

    def _lost(self, item: Settlement, watch: Watch | None) -> None:
        error = DeliveryLost("the consumer was left before this was settled")
        self._on_error(item.delivery, error)
        if watch is not None and watch.done is not None:
            watch.done(error)
