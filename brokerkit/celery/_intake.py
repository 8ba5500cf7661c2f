"""What one channel of Kombu reads: several queues, one credit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Final

from .._redact import error_text
from ..address import Queue
from ..errors import BrokerError, DecodeError, NotFound
from ..message import Message
from ..policy import MAX_PREFETCH
from ._envelope import check_task, due, level, pack, redelivered, unseal
from ._exchanges import Exchanges
from ._feed import Feed
from ._getting import Getting
from ._item import Item, Key, key_of, published
from ._mailboxes import Mailbox
from ._outcomes import Kind, Outcomes, copy
from ._pace import Pace

logger = logging.getLogger("brokerkit")

UNLIMITED: Final = 1000
"""Messages that a channel holds at once when it set no prefetch count."""
EARLY: Final = 1000
"""Messages of a channel that were handed out and are not due yet."""
SURPLUS: Final = 0.25
"""Seconds for which what came without credit is kept for it; then others may have it."""
ACKED: Final = 10_000
"""Acknowledged messages that are kept in mind."""
LEAVE: Final = 10.0
"""Seconds in which a closing channel's outcomes are passed on."""


class Intake:
    """Reads the queues of one channel.  All of it runs in the event loop of the broker.

    *deliver* gets messages as they come, as long as there is credit: no more than the prefetch count are unsettled at a time,
    over all queues.  *fail* is told why a queue cannot be read any more.
    """

    def __init__(
        self, exchanges: Exchanges, deliver: Callable[[Sequence[Item]], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._exchanges = exchanges
        self._deliver = deliver
        self._fail = fail
        self._limit = UNLIMITED
        self._unlimited = True
        self._out: set[Item] = set()
        """Handed over and not settled."""
        self._surplus: deque[Item] = deque()
        """What came and has no credit."""
        self._known: dict[Key, Item] = {}
        """What is here and not settled."""
        self._acked: dict[Key, None] = {}
        """What was acknowledged lately: what comes again all the same was acknowledged while the connection was away."""
        self._adjusting = False
        self._early = 0
        self._feeds: dict[str, Feed] = {}
        self._getting = Getting(exchanges, self._got)
        self._boxes: dict[str, tuple[Mailbox, bool]] = {}
        self._outcomes = Outcomes()
        self._wanted: set[str] = set()
        """Queues that were consumed and not cancelled."""
        self._passing: set[Item] = set()
        """Of transient queues, for consumers that do not acknowledge: handed over and not yet taken."""
        self._preparing = asyncio.Lock()
        self._prepared = False
        self._timer: asyncio.TimerHandle | None = None
        self._pace = Pace()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Intake {[*self._feeds, *self._boxes]} out={len(self._out)} of {self._limit}>"

    # ------------------------------------------------------------------ consuming

    async def consume(self, queue: str, no_ack: bool = False) -> None:
        """Read *queue*; return when it is read.  Once more for the same queue changes nothing.

        Raises:
            BrokerError: it cannot be read.
        """
        self._wanted.add(queue)
        found = await self._exchanges.resolve(queue)
        if isinstance(found, Mailbox):
            if queue in self._wanted:
                self._read_box(found, no_ack)
            return
        await self._prepare()
        if queue not in self._wanted:
            return  # cancelled meanwhile
        feed = self._feeds.get(queue)
        if feed is not None and feed.active:
            return
        if feed is not None and not feed.left:
            feed.active, feed.no_ack = True, no_ack
            self._adjust()
            return
        try:
            feed = await self._read(queue, found, no_ack)
        except NotFound:  # somebody has deleted it
            await self._exchanges.restore(queue)
            feed = await self._read(queue, found, no_ack)
        if self._closed:
            await feed.close()
        else:
            self._adjust()

    async def _read(self, queue: str, address: Queue[bytes], no_ack: bool) -> Feed:
        feed = self._feeds[queue] = Feed(self._exchanges.broker, queue, address, no_ack, self._arrived, self._failed)
        try:
            await feed.open(max(1, self._room))
        except BaseException:
            if self._feeds.get(queue) is feed:
                del self._feeds[queue]
            raise
        return feed

    def _read_box(self, box: Mailbox, no_ack: bool) -> None:
        known = self._boxes.get(box.name)
        if known is None or known[0] is not box:  # declared anew, it is another one
            self._boxes[box.name] = box, no_ack
            box.owners.add(self)
            box.readers.append(self._ring)
        self._ring(box)

    async def _prepare(self) -> None:
        """Do what comes before the first message of a durable queue."""
        await self._outcomes.open()
        async with self._preparing:
            if self._exchanges.revokes.wanted and not self._prepared:
                await self._exchanges.revokes.load()
                self._prepared = True

    async def cancel(self, queue: str) -> None:
        """Read *queue* no more: nothing of it is delivered from now on.  What was delivered can still be settled."""
        self._wanted.discard(queue)
        box, _ = self._boxes.pop(queue, (None, False))
        if box is not None:
            with suppress(ValueError):
                box.readers.remove(self._ring)
            if box.auto_delete and not box.readers and self._exchanges.boxes.get(queue) is box:
                self._exchanges.boxes.remove(queue)
        feed = self._feeds.get(queue)
        if feed is not None:
            feed.active = False
            self._give_back([item for item in self._surplus if item.feed is feed])
            self._adjust()

    def prefetch(self, count: int | None) -> None:
        """Have at most *count* messages unsettled; None is without a limit of its own, 0 fetches nothing more."""
        self._unlimited = count is None
        self._limit = UNLIMITED + self._early if count is None else min(count, MAX_PREFETCH)
        self._adjust()

    @property
    def _room(self) -> int:
        return max(0, self._limit - len(self._out) - len(self._surplus))

    def _adjust_soon(self) -> None:
        if not self._adjusting:
            self._adjusting = True
            asyncio.get_running_loop().call_soon(self._adjust)

    def _adjust(self) -> None:
        """Hand over what there is credit for, and tell each feed how much it may fetch."""
        self._adjusting = False
        out, limit, surplus = self._out, self._limit, self._surplus
        if surplus and len(out) < limit:
            self._hand_over([surplus.popleft() for _ in range(min(len(surplus), limit - len(out)))])
        for box, no_ack in self._boxes.values():
            if no_ack or len(out) < limit:
                self._ring(box)
        free = max(0, limit - len(out) + self._pace.ahead - len(surplus)) if limit else 0
        done: list[Feed] = []
        for feed in self._feeds.values():
            if feed.active:
                feed.allow(min(feed.held + free, MAX_PREFETCH))
            else:
                feed.allow(0)
                if not feed.held:
                    done.append(feed)
        self._getting.adjust()
        for feed in done:
            del self._feeds[feed.queue]
            self._leave(feed)

    def _count(self, settled: int) -> None:
        if self._pace.count(settled, asyncio.get_running_loop().time()):
            self._watch()

    def _leave(self, feed: Feed) -> None:
        self._keep(self._close_feed(feed))

    def _keep(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_feed(self, feed: Feed) -> None:
        await self._outcomes.settled()
        try:
            await feed.close()
        except BrokerError as error:
            logger.warning("queue %s: leaving it failed: %s", feed.queue, error_text(error))

    # ------------------------------------------------------------------ what comes

    async def _arrived(self, feed: Feed, messages: Sequence[Message[bytes]]) -> None:
        """Take *messages* over from *feed*."""
        feed.held += len(messages)
        if not feed.active:
            feed.held -= len(messages)
            for message in messages:
                await message.release()
            return
        revokes = self._exchanges.revokes
        items: list[Item] = []
        for message in messages:
            item = await self._take(feed, message)
            if item is None:
                feed.held -= 1
                continue
            if revokes:
                revokes.look(item.payload["headers"], published(message))
            items.append(item)
        if not self._surplus and len(items) <= self._limit - len(self._out):
            if items:
                self._hand_over(items)
            if len(self._feeds) > 1 or len(items) != len(messages):
                self._adjust_soon()
            return
        now = asyncio.get_running_loop().time()
        for item in items:
            item.since = now
        self._surplus.extend(items)
        self._adjust()
        self._watch()

    async def _take(self, feed: Feed, message: Message[bytes]) -> Item | None:
        """Do what `_open` does; no message keeps those behind it from coming."""
        try:
            return await self._open(feed, message)
        except BrokerError:
            raise
        except Exception as error:
            logger.exception("queue %s: %s cannot be read", feed.queue, message.id)
            await message.reject(f"no message of Celery: {error_text(error)}")
            return None

    async def _open(self, feed: Feed, message: Message[bytes]) -> Item | None:
        """Return what *message* is for Kombu; None if it is nothing to hand over now."""
        key = key_of(feed.queue, message)
        known = self._known.get(key)
        if known is not None:
            # Its connection or its lease was lost, so it came again while its consumer works on it: once is enough.
            await known.replace(message)
            return None
        if key in self._acked:
            await message.ack()
            return None
        try:
            payload = unseal(message.body)
            if "task" in payload["headers"]:
                check_task(payload["headers"])
        except DecodeError as error:
            await message.reject(error_text(error))
            return None
        item = Item(feed.queue, payload, feed.no_ack, feed, message, None)
        again = message.deliveries > 1
        if again:
            redelivered(payload)
        if payload["headers"].get("eta"):
            when = due(payload["headers"]["eta"])
            left = 0.0 if when is None else when - time.time()
            if left > 0:
                window = self._exchanges.eta_window
                # From the third delivery on a message comes alone and would stop the queue until it is due.
                if left > window + 1 or self._early >= EARLY or again:
                    await copy(item, left if left <= window else left - window, again=again)
                    return None
                self._early += 1
                item.early = True
                if self._unlimited:  # a prefetch count is raised by Celery itself
                    self._limit += 1
                    self._adjust_soon()
        self._known[key] = item
        return item

    def _hand_over(self, items: list[Item]) -> None:
        self._out.update(items)
        now = time.monotonic()
        for item in items:
            item.since = now
        self._deliver(items)

    def _ring(self, box: Mailbox) -> None:
        """Take what waits in *box*."""
        known = self._boxes.get(box.name)
        if known is None:
            return
        items: list[Item] = []
        no_ack = known[1]
        held, most = (self._passing, UNLIMITED) if no_ack else (self._out, self._limit)
        room = max(0, most - len(held))
        while room > len(items):
            body = box.take()
            if body is None:
                break
            try:
                payload = unseal(body)
            except DecodeError as error:
                logger.warning("queue %s: a message is dropped: %s", box.name, error_text(error))
                continue
            items.append(Item(box.name, payload, no_ack, None, None, box))
        if items:
            held.update(items)
            self._deliver(items)

    def _failed(self, feed: Feed, error: BaseException) -> None:
        if self._feeds.get(feed.queue) is feed:
            del self._feeds[feed.queue]
        self._give_back([item for item in self._surplus if item.feed is feed])
        self._leave(feed)
        if isinstance(error, NotFound) and feed.queue in self._wanted and self._exchanges.keeps(feed.queue):
            logger.warning("queue %s: it has vanished, with all that was in it: it is made anew", feed.queue)
            self._keep(self._restore(feed))
        else:
            self._fail(error)

    async def _restore(self, lost: Feed) -> None:
        """Read the queue of *lost* once more: whoever consumes it need not know, as what it has in hand goes on."""
        queue = lost.queue
        try:
            await self._exchanges.restore(queue)
            if queue not in self._wanted or queue in self._feeds:
                return
            feed = await self._read(queue, lost.address, lost.no_ack)
        except BrokerError as error:
            if queue in self._wanted:
                self._fail(error)
            return
        if self._closed:
            await feed.close()
        else:
            feed.active = queue in self._wanted  # else it is left by this
            self._adjust()

    # ------------------------------------------------------------------ what is too much

    def _watch(self) -> None:
        if self._timer is None and (self._surplus or self._pace.ahead):
            self._timer = asyncio.get_running_loop().call_later(SURPLUS, self._return_surplus)

    def _return_surplus(self) -> None:
        """Let others have what has waited for credit for too long."""
        self._timer = None
        self._count(0)
        late = asyncio.get_running_loop().time() - SURPLUS * 0.9
        self._give_back([item for item in self._surplus if item.since <= late])
        self._watch()
        self._adjust()

    def _give_back(self, items: Sequence[Item]) -> None:
        """Let others have *items*, which wait for credit."""
        if items:
            gone = set(items)
            self._surplus = deque(item for item in self._surplus if item not in gone)
            for item in items:
                self._forget(item)
                self._outcomes.add("release", item)

    # ------------------------------------------------------------------ settling

    def ack(self, items: Sequence[Item]) -> None:
        """Settle *items* as done."""
        self._end("ack", items)

    def reject(self, items: Sequence[Item]) -> None:
        """Dead-letter *items*."""
        self._end("reject", items)

    def requeue(self, items: Sequence[Item]) -> None:
        """Put *items* back into their queues, marked as delivered before; it counts as no failed attempt."""
        self._end("requeue", items)

    def release(self, items: Sequence[Item]) -> None:
        """Put *items* back, which no consumer has seen."""
        self._end("release", items)

    def _end(self, kind: Kind, items: Sequence[Item]) -> None:
        out, outcomes = self._out, self._outcomes
        for item in items:
            if item in out:
                out.discard(item)
            elif item.box is None:
                continue  # it has an outcome
            if item.box is not None:
                self._passing.discard(item)
                if kind in ("requeue", "release"):
                    self._put_back(item, item.box, marked=kind == "requeue")
                continue
            key = self._forget(item)
            if kind == "ack" and key is not None:
                self._acked[key] = None
                if len(self._acked) > ACKED:
                    del self._acked[next(iter(self._acked))]
            outcomes.add(kind, item)
        self._count(len(items))
        self._adjust_soon()

    def _put_back(self, item: Item, box: Mailbox, *, marked: bool) -> None:
        if self._exchanges.boxes.get(box.name) is not box:
            return
        if marked:
            redelivered(item.payload)
        with suppress(BrokerError):
            box.put_back(pack(item.payload), level(item.payload["properties"].get("priority")))
            if not self._closed:
                asyncio.get_running_loop().call_soon(box.ring)

    def _forget(self, item: Item) -> Key | None:
        if item.early:
            self._early -= 1
            self._limit -= self._unlimited
        if item.feed is None or item.message is None:
            return None
        item.feed.held -= 1
        key = key_of(item.queue, item.message)
        self._known.pop(key, None)
        return key

    # ------------------------------------------------------------------ one by one

    async def get(self, queue: str, no_ack: bool = False) -> Item | None:
        """Return one message of *queue*, or None if there is none."""
        found = await self._exchanges.resolve(queue)
        if isinstance(found, Mailbox):
            while (body := found.take()) is not None:
                with suppress(DecodeError):
                    got = Item(queue, unseal(body), no_ack, None, None, found)
                    self._out.add(got)
                    return got
            return None
        await self._prepare()
        return await self._getting.get(queue, found, no_ack)

    async def _got(self, feed: Feed, message: Message[bytes]) -> Item | None:
        item = await self._take(feed, message)
        if item is not None:
            feed.held += 1
            self._out.add(item)
            if item.no_ack:
                self.ack([item])
        return item

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """End: what was handed over and not settled goes back, marked as delivered before where a worker has begun it."""
        if self._closed:
            return
        self._closed = True
        self._wanted.clear()
        if self._timer is not None:
            self._timer.cancel()
        for queue in list(self._boxes):
            await self.cancel(queue)
        self._getting.stop()
        feeds = [*self._feeds.values(), *self._getting.feeds]
        for feed in feeds:
            feed.active = False
        begun = self._exchanges.revokes.begun()
        for item in list(self._out):
            seen = begun is None or item.payload["headers"].get("id") in begun
            self._end("requeue" if seen and item.box is None else "release", (item,))
        self._exchanges.boxes.release(self)
        try:
            async with asyncio.timeout(LEAVE):
                await self._outcomes.settled()
        except TimeoutError:
            logger.warning("%r: what it did last is not passed on after %g s: it comes again", self, LEAVE)
        try:  # leaving a queue stores what was passed on
            async with asyncio.timeout(LEAVE / 3):
                await asyncio.gather(*(feed.close() for feed in feeds), *self._tasks, return_exceptions=True)
        except TimeoutError:
            logger.warning("%r: its queues are not left after %g s", self, LEAVE / 3)
        finally:
            await self._outcomes.close()
