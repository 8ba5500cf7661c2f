"""Looking at what is stored, without taking it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

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

_LOOK: Final = 10_000
"""Elements of a queue that one call looks at: a few milliseconds of the server's time."""
_ROOM: Final = 4 * 1024 * 1024
"""Bytes of records in one reply."""
_ALL: Final = 1 << 48
"""Above every sequence number."""
_NUMBER = re.compile(r"(.+)@([0-9]{1,15})", re.ASCII)
_LETTER = re.compile(r"(.+)@([0-9]{1,20})(?:-([0-9]{1,20}))?", re.ASCII)


# ---------------------------------------------------------------------- queues


async def browse_queue(link: Link, queue: AnyQueue, limit: int, after: str | None) -> list[StoredRecord]:
    """Return the *limit* messages of *queue* with the lowest numbers behind position *after*."""
    match = None if after is None else _NUMBER.fullmatch(after)
    if after is not None and (match is None or match[1] != queue.name):
        raise _no_position(after, queue.name)
    number = 0 if match is None else int(match[2])
    stored: list[StoredRecord] = []
    while len(stored) < limit:
        page, number = await _queue_page(link, queue, limit - len(stored), number)
        stored += page
        if number >= _ALL:
            break
    return stored


async def _queue_page(link: Link, queue: AnyQueue, limit: int, after: int) -> tuple[list[StoredRecord], int]:
    """Return up to *limit* messages behind number *after*, and the number up to which that is all."""
    found: dict[int, StoredRecord] = {}
    below, place, at = _ALL, 0, 0
    while place >= 0:
        reply = await link.call(
            _QUEUE, [entity(queue.name)], [after, limit, below, place, at, _LOOK, _ROOM], timeout=TIMEOUT
        )
        place, at, complete = int(reply[0]), int(reply[1]), int(reply[2])
        for flying, data in zip(reply[3::2], reply[4::2], strict=True):
            number, ended, record = element(queue, data)
            found.setdefault(number, StoredRecord(record, f"{queue.name}@{number}", ended + int(flying)))
        if complete >= 0:
            below = min(below, complete)
        lowest = sorted(number for number in found if number < below)[:limit]
        if len(lowest) == limit:
            below = lowest[-1] + 1
    return [found[number] for number in sorted(found) if number < below], below - 1 if below < _ALL else _ALL


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
