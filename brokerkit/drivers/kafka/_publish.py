"""Publishing: topics and what is published to them; records gather per partition and leave together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

import msgspec

from ...address import Address, Queue
from ...driver import Record
from ...errors import BrokerError, BrokerUnavailable, Closed, NotFound, PublishUnknown, TooLarge
from ...policy import MAX_BODY
from ._batch import Lane, Result
from ._calls import Calls, failures, overtakes
from ._cluster import PAUSE, Cluster
from ._create import create
from ._outbox import Outbox
from ._sender import Sender
from ._tiers import TIERS, is_waiting, served_by, tiered, waiting_for
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

_ANY: Final = 1 << 62


class Outboxes:
    """All publishing of one driver."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls = Calls(cluster.settings.shown, self._sweep)
        self._boxes: dict[str, Outbox] = {}
        """By topic, for good: the numbers of its partitions are counted there."""
        self._now = asyncio.get_running_loop().time
        self._sender: Sender | None = None

    def start(self) -> None:
        """Send from now on: the cluster is open."""
        self._sender = Sender(self._cluster, self._calls)
        self._cluster.watchers.add(self._looked)

    async def idle(self) -> None:
        """Return when nobody waits for a result."""
        await self._calls.idle()

    def close(self) -> None:
        """Send nothing more, and fail what waits."""
        self._cluster.watchers.discard(self._looked)
        if self._sender is not None:
            self._sender.close()
        self._calls.close()
        for box in self._boxes.values():
            box.take_all()
        self._sender = None

    # ------------------------------------------------------------------ adding

    def quick(self, record: Record, timeout: float) -> asyncio.Future[list[Result]] | None:
        """Store *record*, if there is nothing to find out before; else return None, and nothing has happened."""
        box, sender = self._boxes.get(record.address.name), self._sender
        if box is None or box.info is None or sender is None or (record.body and len(record.body) > MAX_BODY):
            return None
        if record.delay >= TIERS[0]:
            return None
        call = self._calls.add_one(record, self._now() + timeout)
        if call is None:
            return None
        lane = box.lane(record)
        lane.pending.append(call)
        sender.add(lane)
        return call.future

    async def copy(self, records: Sequence[Record], timeout: float) -> list[Result]:
        """Store copies of what was accepted before, as `publish` does but for their size: that is no question any more."""
        return await self.publish(records, timeout, most=_ANY)

    async def publish(self, records: Sequence[Record], timeout: float, *, most: int = MAX_BODY) -> list[Result]:
        """Store *records*, in order within each address and key; one result each, after *timeout* seconds at the latest.

        Bodies have *most* bytes each.
        """
        if self._sender is None:
            raise Closed("the connection is closed")
        if not records:
            return []
        end = self._now() + timeout
        first = records[0].address
        for record in records:
            if record.address is not first or record.delay >= TIERS[0]:
                return await self._mixed([_routed(record) for record in records], end, most)
        return await self._one(first, records, end, most)

    async def _mixed(self, records: Sequence[Record], end: float, most: int) -> list[Result]:
        """Store *records* of several addresses."""
        places: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            places.setdefault(record.address.name, []).append(index)
        parts = [[records[index] for index in own] for own in places.values()]
        answers = await asyncio.gather(*[self._one(part[0].address, part, end, most) for part in parts])
        results: dict[int, Result] = {}
        for own, answer in zip(places.values(), answers, strict=True):
            results.update(zip(own, answer, strict=True))
        return [results[index] for index in range(len(records))]

    async def _one(self, address: Address, records: Sequence[Record], end: float, most: int) -> list[Result]:
        """Store *records*, which are all of *address*."""
        box = self._boxes.get(address.name)
        if box is None or box.info is None:
            try:
                box = await self._open(address, end)
            except BrokerError as error:
                return failures(records, error)
        if (box.derived and not box.tiers) or not _too_large(records, most):
            return await self._add(box, records, end)
        results: dict[int, Result] = {}
        refused: set[bytes] = set()
        for index, record in enumerate(records):
            size = len(record.body or b"")
            if record.key is not None and record.key in refused:
                results[index] = overtakes(record)
            elif size > most:
                results[index] = TooLarge(
                    f"a body of {size} bytes for {box.name} is over the limit of {most}; publish a reference instead"
                )
                if record.key is not None:
                    refused.add(record.key)
        places = [index for index in range(len(records)) if index not in results]
        if places:
            stored = await self._add(box, [records[index] for index in places], end)
            results.update(zip(places, stored, strict=True))
        return [results[index] for index in range(len(records))]

    async def _open(self, address: Address, end: float) -> Outbox:
        """Find out what there is of *address*; a derived one is created."""
        loop = asyncio.get_running_loop()
        await self._check(address, max(0.001, end - loop.time()))
        try:
            info = await self._cluster.topic(address.name, timeout=max(0.001, end - loop.time()))
        except NotFound:
            if ".." not in address.name:
                raise _absent(address) from None
            info = await create(self._cluster, address, timeout=max(0.001, end - loop.time()))
        box = self._boxes.get(address.name)
        if box is None:
            box = self._boxes[address.name] = Outbox(address)
        if box.info is None:
            self._adopt(box, self._cluster.known(box.name) or info)
        return box

    async def _check(self, address: Address, timeout: float) -> None:
        """Refuse what is to wait for a queue that is missing."""
        if isinstance(address, Queue) and is_waiting(address):
            try:
                await self._cluster.topic(served_by(address), timeout=timeout)
            except NotFound:
                raise NotFound(f"queue {served_by(address)} does not exist; declare it") from None

    def _add(self, box: Outbox, records: Sequence[Record], end: float) -> asyncio.Future[list[Result]]:
        call = self._calls.add(records, end)
        sender = self._sender
        if sender is not None:
            run = box.run(len(records))
            last: Lane | None = None
            for entry in call.entries:
                lane = box.lane(entry.record, run)
                lane.pending.append(entry)
                if lane is not last:
                    sender.add(lane)
                    last = lane
        return call.future

    def _sweep(self) -> None:
        for box in self._boxes.values():
            for lane in box.lanes:
                lane.sweep(self._calls.drop)

    # ------------------------------------------------------------------ topics that come and go

    def _looked(self) -> None:
        """See what has become of topics and leaders."""
        for box in list(self._boxes.values()):
            info = self._cluster.known(box.name)
            if info is not None and info is not box.info:
                self._adopt(box, info)
            elif info is None and box.info is not None:
                self._gone(box)
        if self._sender is not None:
            self._sender.moved()

    def _adopt(self, box: Outbox, info: TopicInfo) -> None:
        """Have *box* go on with the topic as it is by now, which may be another one."""
        sender = self._sender
        if sender is None:
            return
        stranded = box.adopt(info, sender.producer)
        unknown = PublishUnknown(f"topic {box.name} was deleted and made again meanwhile")
        self._calls.fail([entry for entry in stranded if entry.doubtful], unknown)
        for entry in stranded:
            if entry.open:
                entry.batch = None
                box.lane(entry.record).pending.append(entry)
            else:
                self._calls.drop(entry)
        for lane in box.lanes:
            if lane.waiting:
                sender.add(lane)

    def _gone(self, box: Outbox) -> None:
        """There is no such topic any more, or it may not be seen."""
        box.lose()
        error = self._cluster.trouble(box.name)
        if not isinstance(error, NotFound):
            self._calls.fail(box.take_all(), error or BrokerUnavailable(f"nothing is known of topic {box.name}"))
        elif not box.derived:
            self._calls.fail(box.take_all(), _absent(box.address))
        elif box.waiting:
            self._cluster.begin(self._make, box)

    async def _make(self, box: Outbox) -> None:
        """Create a derived topic anew: something waits for it."""
        while box.info is None and box.waiting:
            try:
                await self._check(box.address, self._cluster.settings.timeout)
                await create(self._cluster, box.address, timeout=self._cluster.settings.timeout)
            except BrokerUnavailable as error:
                self._calls.problem = error
            except BrokerError as error:
                self._calls.fail(box.take_all(), error)
            except Exception as error:
                logger.exception("%s: creating %s failed", self._cluster.settings.shown, box.name)
                self._calls.fail(box.take_all(), BrokerError(f"the driver failed: {type(error).__name__}"))
            await asyncio.sleep(PAUSE)


def _routed(record: Record) -> Record:
    """Return *record*, or the same as a record of where it waits for its time."""
    if record.delay >= TIERS[0] and isinstance(record.address, Queue) and tiered(record.address):
        return msgspec.structs.replace(record, address=waiting_for(record.address))
    return record


def _absent(address: Address) -> NotFound:
    return NotFound(f"{address!r} does not exist; declare it")


def _too_large(records: Sequence[Record], most: int) -> bool:
    for record in records:  # noqa: SIM110 - any() takes twice the time
        if record.body is not None and len(record.body) > most:
            return True
    return False
