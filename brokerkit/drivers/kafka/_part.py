"""One partition as it is read: what has come of it and was not taken yet."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from ...errors import BrokerError
from ._answer import Aborted, Batch, damaged, split
from ._records import Native


class Part:
    """One partition from an offset on.  Batches are opened one at a time, when their records are taken."""

    __slots__ = (
        "_after", "_batch", "_batches", "_dense", "_left", "_records", "_size", "asked", "at_hand", "broken", "busy", "end", "epoch", "fetch",
        "index", "next", "node", "place", "start", "until",
    )  # fmt: skip

    def __init__(self, topic: str, index: int, offset: int) -> None:
        self.index = index
        self.place = f"{topic}[{index}]"
        self.next = offset
        """What is taken next."""
        self.fetch = offset
        """What is asked for next."""
        self.epoch = -1
        """The leader's epoch in front of that, by which a broker notices that its log is another one."""
        self.start = -1
        """Where the log began when the broker last said so."""
        self.end: int | None = None
        """Where the log ended for readers when the broker last said so."""
        self.at_hand = 0
        """Bytes of what has come and was not taken."""
        self.broken: BrokerError | None = None
        """Why nothing more comes out of it."""
        self.node = -1
        """The broker that leads it; -1 while none is known."""
        self.asked: object = None
        """The request that is under way for it."""
        self.until = -math.inf
        """When it may be asked for again."""
        self.busy = True
        """Whether something may be there at once: the last answer had something, or there was none yet."""
        self._batches: deque[Batch] = deque()
        self._batch: Batch | None = None
        """What is being taken."""
        self._dense = False
        """Whether it has to have a record at each offset, as all have that were not compacted."""
        self._records: Iterator[Native] = iter(())
        """What is left of it."""
        self._left = 0
        """How many records that are."""
        self._after = offset
        """Where the log goes on behind them."""
        self._size = 0
        """Bytes of that batch."""

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return self._left > 0 or bool(self._batches)

    def keep(self, data: bytes | None, aborted: Iterable[Aborted] | None) -> None:
        """Keep what has come, behind all that came before.  If it is damaged this is `broken`."""
        try:
            answer = split(data, self.fetch, aborted, self.place)
        except BrokerError as error:
            self.broken = error
            return
        if self._batches:
            self._batches[-1].next = answer.skipped
        elif self._left:
            self._after = answer.skipped
        else:
            self.next = answer.skipped
        self.fetch = answer.next
        if answer.epoch >= 0:
            self.epoch = answer.epoch
        for batch in answer.batches:
            self.at_hand += batch.size
        self._batches += answer.batches

    def take(self, most: int) -> list[Native]:
        """Return up to *most* records, and go on behind them.  Where they are damaged this is `broken`."""
        taken: list[Native] = []
        while most > 0:
            left = self._left
            if not left:
                if not self._open():
                    break
                left = self._left
            wanted = min(left, most)
            try:
                some = list(islice(self._records, wanted))
            except Exception:
                some = []
            if self._dense and [record.offset for record in some] != list(range(self.next, self.next + wanted)):
                if not self._read_on():
                    break
                continue
            most -= wanted
            if wanted == left:
                self._left = 0
                self.next = self._after
                self.at_hand -= self._size
            else:
                self._left = left - wanted
                self.next = some[-1].offset + 1
            if taken:
                taken += some
            else:
                taken = some
        return taken

    def _open(self) -> bool:
        """Go on with the next batch, if there is one and it is sound."""
        if not self._batches:
            return False
        batch = self._batches.popleft()
        self._size = batch.size
        try:
            self._records = batch.records(self.place)
        except BrokerError as error:
            self.next = batch.base
            self._break(error)
            return False
        self._batch = batch
        self._dense = batch.dense
        if self._dense:
            self.next = batch.base
        self._left = batch.count
        self._after = batch.next
        return True

    def _read_on(self) -> bool:
        """Go on where the decoder is at its wits' end, unless that is for damage."""
        assert self._batch is not None
        try:
            rest = self._batch.rest(self.place, self.next)
            if len(rest) != self._left:
                raise damaged(self.place, self.next, "a batch has fewer records than it says")
        except BrokerError as error:
            self._break(error)
            return False
        self._records = iter(rest)
        self._dense = False
        return True

    def _break(self, error: BrokerError) -> None:
        self.clear()
        self.broken = error

    def clear(self) -> None:
        """Forget what has come and was not taken."""
        self._batches.clear()
        self._left = 0
        self.at_hand = 0

    def go(self, offset: int) -> None:
        """Go on at *offset*, with nothing at hand."""
        self.clear()
        self.epoch = -1
        self.next = self.fetch = offset
