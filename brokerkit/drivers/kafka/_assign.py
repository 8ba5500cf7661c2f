"""Who reads which partition: what the members of a group tell one another, and how their leader shares out.

A group hands its partitions over one by one.  Each member tells which it holds; the leader gives a partition to another
member only when nobody holds it any more.  One that has to move is in nobody's assignment: so its holder learns that others
wait for it, lets it go and joins again, and all the others go on meanwhile.

Members write what any consumer of Kafka does (subscriptions and assignments of the consumer protocol, version 1), so that
Kafka's own tools can show it.  What is ours alone travels as user data.
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, cast

import msgspec
from kio.schema.consumer_protocol_assignment.v1 import data as assignment
from kio.schema.consumer_protocol_subscription.v1 import data as subscription
from kio.serial import entity_reader, entity_writer

PROTOCOL_TYPE: Final = "consumer"
PROTOCOL: Final = "brokerkit"
"""How the leader shares out: members that do it in another way cannot be in the same group."""
_VERSION: Final = b"\0\1"
_CLAIM = re.compile(rb"bk1 (-?\d{1,10}) (\d{1,10}) ([\d,]*)")
_MOVING: Final = b"bk1 moving"

# The generated schemas have number types of their own, which plain numbers satisfy.
_sub: Any = subscription
_assign: Any = assignment
_write_subscription = cast(
    "Callable[[io.BytesIO, Any], None]", entity_writer(subscription.ConsumerProtocolSubscription)
)
_read_subscription = cast("Callable[[bytes, int], Any]", entity_reader(subscription.ConsumerProtocolSubscription))
_write_assignment = cast("Callable[[io.BytesIO, Any], None]", entity_writer(assignment.ConsumerProtocolAssignment))
_read_assignment = cast("Callable[[bytes, int], Any]", entity_reader(assignment.ConsumerProtocolAssignment))


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
    held, leaving = sorted(claim.held), ",".join(str(partition) for partition in sorted(claim.leaving))
    entity = _sub.ConsumerProtocolSubscription(
        topics=(topic,),
        user_data=f"bk1 {claim.generation} {claim.count} {leaving}".encode(),
        owned_partitions=(_sub.TopicPartition(topic=topic, partitions=tuple(held)),) if held else (),
    )
    return _written(_write_subscription, entity)


def read_claim(data: bytes, topic: str) -> Claim | None:
    """Return what a member tells; None if it does not read *topic*, or tells it in a way that is not ours."""
    try:
        entity = _read_subscription(data, 2)[0]
    except Exception:  # whatever another client has written
        return None
    match = _CLAIM.fullmatch(entity.user_data or b"")
    if match is None or topic not in entity.topics:
        return None
    held = _partitions(entity.owned_partitions, topic)
    leaving = frozenset(int(number) for number in match[3].split(b",") if number)
    return Claim(held, held & leaving, int(match[1]), int(match[2]))


def write_share(topic: str, share: Share) -> bytes:
    """Return *share* as the assignment of a member."""
    mine = sorted(share.partitions)
    entity = _assign.ConsumerProtocolAssignment(
        assigned_partitions=(_assign.TopicPartition(topic=topic, partitions=tuple(mine)),) if mine else (),
        user_data=_MOVING if share.moving else None,
    )
    return _written(_write_assignment, entity)


def read_share(data: bytes, topic: str) -> Share:
    """Return what the leader tells; nothing is ours where it tells nothing that can be read."""
    try:
        entity = _read_assignment(data, 2)[0]
    except Exception:  # the leader did not know of us, or is no client of ours
        return Share()
    return Share(_partitions(entity.assigned_partitions, topic), entity.user_data == _MOVING)


def _written(write: Callable[[io.BytesIO, Any], None], entity: object) -> bytes:
    buffer = io.BytesIO()
    buffer.write(_VERSION)
    write(buffer, entity)
    return buffer.getvalue()


def _partitions(entries: Collection[Any], topic: str) -> frozenset[int]:
    return frozenset(int(number) for entry in entries if entry.topic == topic for number in entry.partitions)


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
