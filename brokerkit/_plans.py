"""What a subscription reads, decided from its options: the sources of feeds."""

from __future__ import annotations

from ._binding import Bound
from ._plan import Plan
from .address import AnyTopic, Queue, Topic, check_name, letters_of, redrive_queue
from .driver import Source
from .errors import ConfigError
from .policy import EVERY_REPLICA, MAX_PREFETCH, EveryReplica, Start, whole

AGAIN_PREFETCH = 16
"""For a group's private redrive queue, which is empty nearly always."""


def queue_plans(
    bound: Bound, *, prefetch: int, by_hand: bool, max_deliveries: int = 10, replies: AnyTopic | None = None
) -> list[Plan]:
    """Return the one plan of a queue's subscription."""
    queue = bound.address
    assert isinstance(queue, Queue)
    return [
        Plan(
            source=Source(queue),
            reader=bound,
            prefetch=whole("prefetch", prefetch, low=1, high=MAX_PREFETCH),
            letters=queue.dead_letters,
            replies=replies,
            in_place=False,
            by_key=False,
            by_hand=by_hand,
            max_deliveries=max_deliveries,
            lease=queue.lease,
        )
    ]


def topic_plans(
    bound: Bound,
    *,
    group: str | EveryReplica | None,
    prefix: str,
    start: Start | None,
    prefetch: int,
    until_end: bool = False,
    by_hand: bool,
    max_deliveries: int = 10,
) -> list[Plan]:
    """Return the plans of a topic's subscription; a group reads its private redrive queue too."""
    topic = bound.address
    assert isinstance(topic, Topic)
    whole("prefetch", prefetch, low=1, high=MAX_PREFETCH)
    if start is not None and not isinstance(start, Start):
        raise ConfigError(f"start must be a Start, like Start.EARLIEST, not {start!r}")
    if start is not None and start.kind in ("time", "position") and not bound.capabilities.replay:
        raise bound.refuse(f"start={start!r}")
    if group is None or group is EVERY_REPLICA:
        source = Source(topic, None, start or Start.LATEST, until_end)
        return [
            Plan(
                source=source,
                reader=bound,
                prefetch=prefetch,
                letters=None,
                in_place=True,
                by_key=not by_hand,
                by_hand=by_hand,
                max_deliveries=max_deliveries,
            )
        ]
    if not isinstance(group, str):
        raise ConfigError(f"group must be a name or EVERY_REPLICA, not {group!r}")
    real = prefix + check_name(group, "group name")
    letters = letters_of(topic, real)
    main = Plan(
        source=Source(topic, real, start or Start.EARLIEST, until_end),
        reader=bound,
        prefetch=prefetch,
        letters=letters,
        in_place=True,
        by_key=True,
        by_hand=by_hand,
        max_deliveries=max_deliveries,
    )
    again = redrive_queue(topic, real)
    beside = Plan(
        source=Source(again),
        reader=bound,
        prefetch=min(prefetch, AGAIN_PREFETCH),
        letters=letters,
        in_place=False,
        by_key=False,
        by_hand=by_hand,
        max_deliveries=max_deliveries,
        lease=again.lease,
        beside=main.source,
    )
    return [main, beside]
