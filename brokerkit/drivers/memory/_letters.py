"""A dead letter address: letters in the order of their arrival, owned by nobody."""

from __future__ import annotations

import bisect

from ...driver import Receipt, Record, StoredRecord
from ...errors import BrokerError
from ...policy import MAX_BODY
from ._stored import too_large


class Letters:
    """The dead letters of a queue, or of one group of a topic.  They have no limit: what died must be kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._letters: dict[int, StoredRecord] = {}
        self._order: list[int] = []
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._letters)

    def put(self, record: Record, at: float = 0.0) -> Receipt | BrokerError:
        """Store *record* at the end."""
        if record.body is not None and len(record.body) > MAX_BODY:
            return too_large(record)
        return self.keep(record)

    def keep(self, record: Record, at: float = 0.0) -> Receipt:
        """Store *record*, whose size was checked."""
        self._sequence = number = self._sequence + 1
        position = f"{self.name}@{number}"
        self._letters[number] = StoredRecord(record, position, record.deliveries)
        self._order.append(number)
        return Receipt(record.id, position)

    def get(self, number: int) -> StoredRecord | None:
        """Return the letter with that number, if it is there."""
        return self._letters.get(number)

    def remove(self, number: int) -> None:
        """Take the letter with that number out."""
        del self._letters[number]
        if len(self._order) > 2 * len(self._letters) + 64:
            self._order = [number for number in self._order if number in self._letters]

    def browse(self, limit: int, after: int) -> list[StoredRecord]:
        """Return up to *limit* letters with numbers above *after*."""
        found: list[StoredRecord] = []
        order = self._order
        place = bisect.bisect_right(order, after)
        while place < len(order) and len(found) < limit:
            letter = self._letters.get(order[place])
            if letter is not None:
                found.append(letter)
            place += 1
        return found

    def purge(self) -> int:
        """Remove all letters and return how many."""
        count = len(self._letters)
        self._letters.clear()
        self._order.clear()
        return count

    def oldest(self) -> float | None:
        """Return when the oldest letter was first published."""
        return min((letter.record.timestamp for letter in self._letters.values()), default=None)
