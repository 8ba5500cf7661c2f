"""Who reads which partition: what the members of a group tell one another, and how their leader shares out.

A group hands its partitions over one by one.  Each member tells which it holds; the leader gives a partition to another
member only when nobody holds it any more.  One that has to move is in nobody's assignment: so its holder learns that others
wait for it, lets it go and joins again, and all the others go on meanwhile.

Members write what any consumer of Kafka does (subscriptions and assignments of the consumer protocol, version 1), so that
Kafka's own tools can show it.  What is ours alone travels as user data.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

PROTOCOL_TYPE: Final = "consumer"
PROTOCOL: Final = "brokerkit"
"""How the leader shares out: members that do it in another way cannot be in the same group."""
_VERSION: Final = b"\0\1"
_INT: Final = struct.Struct(">i")
_CLAIM = re.compile(rb"bk1 (-?\d{1,10}) (\d{1,10}) ((?:\d{1,10}(?:,\d{1,10})*)?)")
_MOVING: Final = b"bk1 moving"


class Claim(msgspec.Struct, frozen=True):
    """What one member tells the leader."""

    held: frozenset[int] = frozenset()
    """The partitions that are in its hands, *leaving* ones included."""
    leaving: frozenset[int] = frozenset()
    """Those that it is about to let go."""
    generation: int = -1
    """Of the assignment it has them from: where two claim the same partition, the later one counts."""
    count: int = 0
    """How many partitions it knows of."""


class Share(msgspec.Struct, frozen=True):
    """What the leader tells one member."""

    partitions: frozenset[int] = frozenset()
    moving: bool = False
    """Whether partitions are on their way from one member to another: the next round is near."""


def write_claim(topic: str, claim: Claim) -> bytes:
    """Return *claim* as the metadata of a member that subscribes to *topic*."""
    leaving = ",".join(str(partition) for partition in sorted(claim.leaving))
    note = f"bk1 {claim.generation} {claim.count} {leaving}".encode()
    return b"".join((_VERSION, _INT.pack(1), _text(topic), _INT.pack(len(note)), note, _places(topic, claim.held)))


def read_claim(data: bytes, topic: str) -> Claim | None:
    """Return what a member tells; None if it does not read *topic*, or tells it in a way that is not ours."""
    try:
        reader = _Reader(data)
        topics = [reader.text() for _ in reader.items(2)]
        match = _CLAIM.fullmatch(reader.note())
        held = reader.places(topic)
    except (ValueError, struct.error):  # whatever another client has written
        return None
    if match is None or topic not in topics:
        return None
    leaving = frozenset(int(number) for number in match[3].split(b",") if number)
    return Claim(held, held & leaving, int(match[1]), int(match[2]))


def write_share(topic: str, share: Share) -> bytes:
    """Return *share* as the assignment of a member."""
    note = _INT.pack(len(_MOVING)) + _MOVING if share.moving else _INT.pack(-1)
    return b"".join((_VERSION, _places(topic, share.partitions), note))


def read_share(data: bytes, topic: str) -> Share:
    """Return what the leader tells; nothing is ours where it tells nothing that can be read."""
    try:
        reader = _Reader(data)
        return Share(reader.places(topic), reader.note() == _MOVING)
    except (ValueError, struct.error):  # the leader did not know of us, or is no client of ours
        return Share()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">h", len(data)) + data


def _places(topic: str, partitions: Collection[int]) -> bytes:
    """Return *partitions* of *topic*, in a list of topics that is empty if there are none."""
    if not partitions:
        return _INT.pack(0)
    numbers = struct.pack(f">{len(partitions)}i", *sorted(partitions))
    return b"".join((_INT.pack(1), _text(topic), _INT.pack(len(partitions)), numbers))


class _Reader:
    """Reads what members have written, who may be any clients: kio's reader believes any length that it is told.

    All of it raises `ValueError` or `struct.error` where that makes no sense.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = len(_VERSION)

    def _number(self) -> int:
        (number,) = _INT.unpack_from(self._data, self._at)
        self._at += 4
        return int(number)

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if not self._at <= end <= len(self._data):
            raise ValueError("it is cut off")
        taken, self._at = self._data[self._at : end], end
        return taken

    def items(self, least: int) -> range:
        """Return something as long as the list that follows, of which each item takes *least* bytes."""
        count = self._number()
        if not 0 <= count <= (len(self._data) - self._at) // least:
            raise ValueError("the list is longer than what is there")
        return range(count)

    def text(self) -> str:
        """Return a text."""
        (size,) = struct.unpack_from(">h", self._data, self._at)
        self._at += 2
        return self._take(size).decode()

    def note(self) -> bytes:
        """Return user data; nothing if there is none."""
        size = self._number()
        return b"" if size == -1 else self._take(size)

    def places(self, topic: str) -> frozenset[int]:
        """Return the partitions of *topic* in a list of topics."""
        found: set[int] = set()
        for _ in self.items(6):
            name = self.text()
            count = len(self.items(4))
            numbers = struct.unpack(f">{count}i", self._take(4 * count))
            if name == topic:
                found.update(numbers)
        return frozenset(found)


def share_out(count: int, members: Mapping[str, Claim | None]) -> dict[str, Share]:
    """Return each member's share of *count* partitions.

    Everybody keeps what it holds, up to its part: all partitions by all members, give or take one.  What is in nobody's hands
    goes to those who have less.  What somebody holds beyond its part, or is about to let go, goes to nobody yet.  The same
    claims always lead to the same shares.
    """
    taking = {name: claim for name, claim in members.items() if claim is not None}
    kept: dict[str, list[int]] = {name: [] for name in taking}
    moving = 0
    free = set(range(count))
    for partition, name in _holders(count, taking).items():
        free.discard(partition)
        if partition in taking[name].leaving:
            moving += 1
        else:
            kept[name].append(partition)
    least, more = divmod(count, len(taking)) if taking else (0, 0)
    # Who has more keeps more: fewer have to move.
    order = sorted(taking, key=lambda name: (-len(kept[name]), name))
    part = {name: least + (place < more) for place, name in enumerate(order)}
    for name, mine in kept.items():
        moving += max(0, len(mine) - part[name])
        kept[name] = sorted(mine)[: part[name]]
    waiting = [(len(kept[name]), name) for name in order if len(kept[name]) < part[name]]
    heapq.heapify(waiting)
    for partition in sorted(free):
        if not waiting:
            break
        has, name = waiting[0]
        kept[name].append(partition)
        if has + 1 < part[name]:
            heapq.heapreplace(waiting, (has + 1, name))
        else:
            heapq.heappop(waiting)
    return {name: Share(frozenset(kept.get(name, ())), moving > 0) for name in members}


def _holders(count: int, members: Mapping[str, Claim]) -> dict[int, str]:
    """Return who holds what: of several claims the latest counts, since those before it are out of date."""
    holders: dict[int, str] = {}
    for name in sorted(members, key=lambda name: (members[name].generation, name)):
        for partition in members[name].held:
            if 0 <= partition < count:
                holders[partition] = name
    return holders
