"""Looking at what is stored, without taking it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ...address import AnyDeadLetters, AnyQueue, AnyTopic
from ...driver import StoredRecord
from ...errors import ConfigError
from ...policy import Start
from ._frames import element, read
from ._keys import entity
from ._link import Argument, Link
from ._scripts import Script
from ._topic_place import check_place, start_args

TIMEOUT: Final = 30.0
"""Seconds that one call may take; what an administrator asks for has no deadline of its own."""

_QUEUE: Final = Script("admin_browse_queue")
_TOPIC: Final = Script("admin_browse_topic")
_LETTERS: Final = Script("admin_letters")

_LOOK: Final = 4000
"""Elements of a queue that one call looks at: a few milliseconds of the server's time."""
_AHEAD: Final = 4000
"""Messages to look for at once in a queue that has more than that."""
_FRESH: Final = 2.0
"""Seconds for which what was read ahead is shown."""
_ROOM: Final = 4 * 1024 * 1024
"""Bytes of records in one reply."""
_ALL: Final = 1 << 48
"""Above every sequence number."""
_NUMBER = re.compile(r"(.+)@([0-9]{1,15})", re.ASCII)
_LETTER = re.compile(r"(.+)@([0-9]{1,20})(?:-([0-9]{1,20}))?", re.ASCII)


# ---------------------------------------------------------------------- queues


class Ahead(msgspec.Struct):
    """What was read beyond a page of a long queue, for the next one: each look goes through the whole queue."""

    after: str
    records: list[StoredRecord]
    through: bool
    """Whether nothing follows them."""
    until: float


async def browse_queue(
    link: Link, queue: AnyQueue, limit: int, after: str | None, ahead: dict[str, Ahead]
) -> list[StoredRecord]:
    """Return the *limit* messages of *queue* with the lowest numbers behind position *after*.

    *ahead* keeps what was read for the next page, for `_FRESH` seconds.
    """
    number = 0 if after is None else _number_of(after, queue)
    now = asyncio.get_running_loop().time()
    stored: list[StoredRecord] = []
    known = ahead.pop(queue.name, None)
    through, until = False, now + _FRESH
    if known is not None and known.after == after and now < known.until:
        stored, through, until = known.records, known.through, known.until
    while len(stored) < limit and not through:
        if stored:
            number = _number_of(stored[-1].position, queue)
        page, number = await _queue_page(link, queue, limit - len(stored), number)
        stored += page
        through = number >= _ALL
    page, rest = stored[:limit], stored[limit:]
    if rest:
        ahead[queue.name] = Ahead(page[-1].position, rest, through, until)
    return page


async def _queue_page(link: Link, queue: AnyQueue, limit: int, after: int) -> tuple[list[StoredRecord], int]:
    """Return messages behind number *after*, and the number up to which that is all: *limit* of them, or more of a long queue."""
    found: dict[int, StoredRecord] = {}
    below, place, at = _ALL, 0, 0
    while place >= 0:
        args = [after, limit, below, place, at, _LOOK, _ROOM]
        reply = await link.call(_QUEUE, [entity(queue.name)], args, timeout=TIMEOUT)
        first = not place
        place, at, complete = int(reply[0]), int(reply[1]), int(reply[2])
        if first and place >= 0 and limit < _AHEAD:  # it is a long one: look once for many
            limit, place, at = _AHEAD, 0, 0
            continue
        for flying, data in zip(reply[3::2], reply[4::2], strict=True):
            number, ended, record = element(queue, data)
            found.setdefault(number, StoredRecord(record, f"{queue.name}@{number}", ended + int(flying)))
        if complete >= 0:
            below = min(below, complete)
        found, below = _lowest(found, limit, below)
    return list(found.values()), below - 1 if below < _ALL else _ALL


def _lowest(found: dict[int, StoredRecord], limit: int, below: int) -> tuple[dict[int, StoredRecord], int]:
    """Return those of *found* that are kept, in their order, and the number below which all are."""
    kept: dict[int, StoredRecord] = {}
    size = 0
    for number in sorted(found):
        if number >= below:
            break
        if len(kept) == limit or size > _ROOM:
            return kept, number
        kept[number] = stored = found[number]
        size += len(stored.record.body or b"")
    return kept, below


def _number_of(position: str, queue: AnyQueue) -> int:
    match = _NUMBER.fullmatch(position)
    if match is None or match[1] != queue.name:
        raise _no_position(position, queue.name)
    return int(match[2])


# ---------------------------------------------------------------------- topics


async def browse_topic(
    link: Link, topic: AnyTopic, limit: int, start: Start | None, after: str | None
) -> list[StoredRecord]:
    """Return *limit* records of *topic* from *start* on, behind position *after*, in the order of their times."""
    start = start or Start.EARLIEST
    begin = start_args(topic, start)
    seen: list[Argument] = [-1, "0-0"]
    if after is not None:
        kind, *seen = start_args(topic, Start.position(after))
        if kind != "position":
            raise _no_position(after, topic.name)
    stored: list[StoredRecord] = []
    more = 1
    while more and len(stored) < limit:
        reply: list[Any] = await link.call(
            _TOPIC, [entity(topic.name)], [limit - len(stored), _ROOM, *seen, *begin], timeout=TIMEOUT
        )
        check_place(topic, start, reply)
        more = int(reply[0])
        for partition, id, data in zip(reply[1::3], reply[2::3], reply[3::3], strict=True):
            position = f"{topic.name}[{partition}]@{id.decode()}"
            record = read(topic, data, number=position)
            stored.append(StoredRecord(record, position, record.deliveries))
            seen = [int(partition), id]
    return stored


# ---------------------------------------------------------------------- dead letters


async def browse_letters(link: Link, letters: AnyDeadLetters, limit: int, after: str | None) -> list[StoredRecord]:
    """Return *limit* letters behind position *after*."""
    place = "-" if after is None else f"({letter_id(after, letters)}"
    stored: list[StoredRecord] = []
    more = 1
    while more and len(stored) < limit:
        args: list[Argument] = ["after", _ROOM, place, limit - len(stored)]
        more, *found = await link.call(_LETTERS, _keys_of(letters), args, timeout=TIMEOUT)
        for id, data in zip(found[::2], found[1::2], strict=True):
            place = f"({id.decode()}"
            stored.append(_letter(letters, id, data))
    return stored


async def find_letters(link: Link, letters: AnyDeadLetters, ids: Sequence[str]) -> dict[str, StoredRecord]:
    """Return those letters that are there, by their ids: all of them or, where they are large, at least the first."""
    _, *found = await link.call(_LETTERS, _keys_of(letters), ["these", _ROOM, *ids], timeout=TIMEOUT)
    return {id.decode(): _letter(letters, id, data) for id, data in zip(found[::2], found[1::2], strict=True)}


def letter_id(position: str, letters: AnyDeadLetters) -> str:
    """Return the entry id of a position in *letters*, or raise `ConfigError`."""
    match = _LETTER.fullmatch(position)
    if match is None or match[1] != letters.name:
        raise _no_position(position, letters.name)
    return f"{int(match[2])}-{int(match[3] or 0)}"


def _letter(letters: AnyDeadLetters, id: bytes, data: bytes) -> StoredRecord:
    # What others have put there may have a second number.
    number, _, second = id.decode().partition("-")
    position = f"{letters.name}@{number}" if second == "0" else f"{letters.name}@{number}-{second}"
    record = read(letters, data, number=id.decode())
    return StoredRecord(record, position, record.deliveries)


def _keys_of(letters: AnyDeadLetters) -> list[bytes]:
    return [entity(letters.name), entity(letters.of.name)]


def _no_position(position: str, name: str) -> ConfigError:
    return ConfigError(f"{position!r} is no position in {name}")
