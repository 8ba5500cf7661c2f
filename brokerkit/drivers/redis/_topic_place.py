"""Places in a topic: where reading begins, moving a group, and how far it is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final

from ...address import AnyTopic, Topic
from ...driver import Backlog, Source
from ...errors import BrokerError, ConfigError, NotFound, PositionLost
from ...policy import LOG_WINDOW, Start
from .._log import Tracker
from ._frames import read
from ._keys import entity
from ._link import Argument, Link
from ._publish import derived_settings
from ._scripts import TOPIC_LOOK, TOPIC_SEEK

TIMEOUT: Final = 10.0
_ID = r"[0-9]{1,15}-[0-9]{1,15}"
_POSITION: Final = re.compile(rf"([^\[\]]+)\[([0-9]{{1,5}})\]@({_ID})", re.ASCII)
_CURSOR: Final = re.compile(rf"([^\[\]]+)\[\*\]@({_ID}(?:,{_ID})*)", re.ASCII)
_PER_PARTITION: Final = 5


def start_args(topic: AnyTopic, start: Start) -> list[Argument]:
    """Return *start* as scripts take it.

    Raises:
        ConfigError: it is no position in *topic*.
    """
    match start.kind:
        case "earliest" | "latest":
            return [start.kind]
        case "time":
            return ["time", max(0, math.floor(float(start.value) * 1000))]
        case "position":
            text = str(start.value)
            if (place := _POSITION.fullmatch(text)) is not None and place[1] == topic.name:
                return ["position", int(place[2]), place[3]]
            if (cursor := _CURSOR.fullmatch(text)) is not None and cursor[1] == topic.name:
                return ["cursor", *cursor[2].split(",")]
            raise ConfigError(f"{text[:100]!r} is no position in {topic.name}")


def check_place(topic: AnyTopic, start: Start, reply: list[Any]) -> None:
    """Raise what a script found wrong with *start*."""
    shown = str(start.value)
    match reply[0]:
        case b"later":
            raise ConfigError(f"there is no position {shown} yet")
        case b"lost" if len(reply) > 1:
            lost = int(reply[1])
            raise PositionLost(f"{lost} records of {topic.name} behind {shown} were removed", lost=lost)
        case b"lost":
            raise PositionLost(f"{topic.name} was deleted and made again: {shown} is gone")
        case b"none":
            raise PositionLost(f"there is no record at {shown}")
        case _:
            return


def missing(topic: AnyTopic, link: Link, error: BrokerError) -> BrokerError:
    """Return *error*, saying what to do where *topic* does not exist."""
    if not isinstance(error, NotFound):
        return error
    found = NotFound(f"{topic!r} does not exist on {link.settings.shown}; declare it")
    found.__cause__ = error.__cause__
    return found


def _topic_of(source: Source) -> AnyTopic:
    if not isinstance(source.address, Topic):
        raise ConfigError(f"{source.address!r} has no groups; only topics do")
    return source.address


async def seek(link: Link, source: Source) -> None:
    """Move the position of a group without members, or store that of a new one.

    Raises:
        NotFound: the topic does not exist.
        ConfigError: the group has live members, or the position is of another topic.
        PositionLost: the position is gone.
    """
    topic = _topic_of(source)
    if source.group is None:
        raise ConfigError("only a group has a position")
    args = [derived_settings(topic), source.group, *start_args(topic, source.start)]
    try:
        key = entity(topic.name)
        reply = await link.call(
            TOPIC_SEEK, [key, b"%b:p:%b" % (key, os.urandom(8).hex().encode())], args, timeout=TIMEOUT
        )
    except NotFound as error:
        raise missing(topic, link, error) from error.__cause__
    if reply[0] == b"live":
        raise ConfigError(
            f"group {source.group!r} of {topic.name} has {reply[1]} live members; stop them first"
            " (one that died counts until its session has ended)"
        )
    check_place(topic, source.start, reply)


async def backlog(
    link: Link, source: Source, dead: int | None = None, own: Callable[[], Mapping[int, Tracker]] = dict
) -> Backlog:
    """Return what a group has left to do; *dead* is passed through.

    *own* returns the trackers of partitions of this very process, by number: of those more is known than is stored.

    Raises:
        NotFound: the topic does not exist.
    """
    topic = _topic_of(source)
    if source.group is None:
        return Backlog()
    now, parts = await look(link, topic, source, oldest=True)
    waiting = in_flight = 0
    oldest: float | None = None
    known = own()
    for number, (end, first, stored, frame) in enumerate(parts):
        tracker = known.get(number, stored)
        waiting += max(0, end - max(tracker.high, first)) + tracker.waiting
        in_flight += tracker.in_hand
        if frame and max(tracker.base, first) < end:
            timestamp = read(topic, frame).timestamp
            oldest = timestamp if oldest is None else min(oldest, timestamp)
    age = None if oldest is None else max(0.0, now - oldest)
    return Backlog(waiting=waiting, in_flight=in_flight, delayed=0, dead=dead, oldest_age=age)


async def look(
    link: Link, topic: AnyTopic, source: Source, *, oldest: bool
) -> tuple[float, list[tuple[int, int, Tracker, bytes]]]:
    """Return the server's time and, for each partition, its end, its first offset, what the group has done with it as far as
    that is stored, and with *oldest* the frame of its oldest unsettled record.
    """
    args: list[Argument] = [source.group or "", 1 if oldest else 0, *start_args(topic, source.start)]
    try:
        now, *found = await link.call(TOPIC_LOOK, [entity(topic.name)], args, timeout=TIMEOUT)
    except NotFound as error:
        raise missing(topic, link, error) from error.__cause__
    parts: list[tuple[int, int, Tracker, bytes]] = []
    for at in range(0, len(found), _PER_PARTITION):
        end, first, position, mark, frame = found[at : at + _PER_PARTITION]
        parts.append((int(end), int(first), tracker_at(position.decode(), mark), frame))
    return now / 1000, parts


async def all_ended(link: Link, topic: AnyTopic, source: Source, ends: Sequence[int], own: Container[int]) -> bool:
    """Return whether a group has come to *ends* in all partitions but its *own*."""
    _, parts = await look(link, topic, source, oldest=False)
    return all(
        tracker.next >= end or number in own
        for number, (end, (_, _, tracker, _)) in enumerate(zip(ends, parts, strict=True))
    )


def tracker_at(position: str, mark: bytes) -> Tracker:
    """Return the tracker that is stored as *position*, an id and a note, with the *mark* that was written ahead."""
    id, _, note = position.partition(" ")
    base = int(id.rpartition("-")[2])
    tracker = Tracker.decode(base, note)
    if mark:
        tracker.high = max(tracker.high, min(int(mark), base + LOG_WINDOW))
    return tracker
