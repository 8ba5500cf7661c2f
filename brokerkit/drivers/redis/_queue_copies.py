"""Settlements that publish: as arguments of the script that stores their records and acknowledges, both or none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from redis.exceptions import ResponseError

from ...address import Address, AnyQueue, Topic
from ...driver import Record, Settlement
from ...errors import BrokerError, NotFound
from ...policy import MAX_BODY
from ._errors import translate
from ._frames import topic_blob, writer
from ._keys import entity
from ._publish import derived_settings, kind_of, too_large
from ._queue_session import Lease
from ._scripts import QUEUE_OUTCOME, Script

ITEMS: Final = 200
BYTES: Final = 512 * 1024
"""Most items and bytes in one call, unless one item has more."""


class Part(msgspec.Struct):
    """What goes into one call."""

    indexes: list[int]
    """Of the items in it."""
    keys: list[bytes]
    """Of the entities that copies go to."""
    args: list[bytes | int]


class Copies:
    """Makes the arguments for one queue."""

    script: Script = QUEUE_OUTCOME

    def __init__(self, queue: AnyQueue) -> None:
        self._queue = queue
        self._spread = itertools.count()

    def parts(
        self, items: Sequence[Settlement], indexes: Sequence[int], results: list[BrokerError | None]
    ) -> Iterator[Part]:
        """Yield calls for the items at *indexes*; what cannot be sent gets its error in *results*."""
        targets: dict[bytes, int] = {}
        head: list[bytes | int] = []
        body: list[bytes | int] = []
        chosen: list[int] = []
        size = 0
        for index in indexes:
            item = items[index]
            large = next((record for record in item.publish if len(record.body or b"") > MAX_BODY), None)
            if large is not None:
                results[index] = too_large(large)
                continue
            lease: Lease = item.delivery.token  # type: ignore[assignment]
            body += (lease.number, len(item.publish))
            for record in item.publish:
                address = record.address
                key = entity(address.name)
                target = targets.get(key)
                if target is None:
                    target = targets[key] = len(targets) + 2  # the first key is the queue itself
                    head += (kind_of(address), derived_settings(address))
                blob = self._blob(address, record)
                body += (target, blob)
                size += len(blob)
            chosen.append(index)
            if len(chosen) >= ITEMS or size >= BYTES:
                yield Part(chosen, list(targets), [*head, *body])
                targets, head, body, chosen, size = {}, [], [], [], 0
        if chosen:
            yield Part(chosen, list(targets), [*head, *body])

    def _blob(self, address: Address, record: Record) -> bytes:
        if isinstance(address, Topic) and record.key is None:
            return topic_blob(record, next(self._spread))
        return writer(address)(record)

    def refused(self, item: Settlement, status: bytes) -> BrokerError:
        """Return the error for *item*, one of whose records the server refused with *status*."""
        names = ", ".join(sorted({record.address.name for record in item.publish}))
        if status == b"BK NOTFOUND":
            return NotFound(
                f"{names} does not exist; declare it" if "," not in names else f"one of {names} does not exist"
            )
        return translate(ResponseError(status.decode()), f"settling with copies to {names}")
