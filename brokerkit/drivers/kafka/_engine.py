"""Which kind of group serves a queue, and what goes with it.

The group of a queue has the queue's own name, and its type in the cluster says which engine serves the queue: brokers refuse
to let a share group be used as a classic one, and the other way round.  So two processes never serve one queue by different
engines, whatever each of them knows or may do.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from ...address import AnyQueue
from ...errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError
from ._cluster import PAUSE, Cluster
from ._coordinator import committed, store_start
from ._look import bounds
from ._share_group import (
    ISOLATION,
    LIMIT,
    LOCK,
    RENEW,
    RESET,
    WINDOW,
    Engine,
    NotOffered,
    Place,
    begin,
    describe,
    offered,
    other_kind,
    places,
    set_one,
    settings,
    settings_of_broker,
)
from ._topic_settings import lease_at_birth
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

MOST_DELIVERIES: Final = 10
"""What the brokers should count to before they drop a record: as far as any of them goes by itself."""
WIDEST: Final = 10_000
"""Records of the widest window that any broker allows."""
_FRESH: Final = 1.0
"""Seconds for which it is believed that there is no group: whoever was frozen since then looks again."""
_ANCHORS: Final = (30_000, 15_000, 60_000)
"""Milliseconds of a lock, one of which every broker takes that is set up as usual."""
_SECOND: Final = 1000


class Terms(msgspec.Struct, frozen=True):
    """How a queue is served."""

    engine: Engine
    limit: int = 5
    """Deliveries that the brokers count before they drop a record; nothing for a classic group."""
    lock: float | None = None
    """Seconds that a record stays with a member that is silent, if that is known before the first is there."""
    window: int = 2000
    """Records of a partition from the oldest that is not done on, behind which the brokers hand out no more."""


async def engine_of(cluster: Cluster, group: str, *, timeout: float) -> Engine | None:
    """Return the engine of the queue of that name, None if there is none yet.

    Raises:
        AuthorizationError: the group may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    found = await describe(cluster, group, timeout=timeout)
    return None if found is None else found.engine


async def reserve(cluster: Cluster, queue: AnyQueue, info: TopicInfo, *, timeout: float) -> Terms:
    """Return how *queue*, whose topic is *info*, is served; if nothing serves it yet, decide that.

    Share groups serve it where the cluster has them.  A right that is missing changes nothing about that.

    Raises:
        AuthorizationError: the user lacks a right that the queue's engine takes.
        ConfigError: a group of the queue's name is used by others.
        BrokerUnavailable: it was not done within *timeout* seconds.
    """
    end = _now() + timeout
    group = queue.name
    while True:
        engine = await engine_of(cluster, group, timeout=_left(end))
        if engine is None:
            try:
                if await offered(cluster, group, timeout=_left(end)):
                    await _begin_share(cluster, queue, info, end)
                else:
                    await _begin_classic(cluster, queue, info, end)
            except NotOffered:  # switched off a moment ago
                engine = None
        elif engine == "share":
            await _begin_rest(cluster, queue, info, end)
            return await terms_of(cluster, group, timeout=_left(end))
        else:
            return Terms("classic")
        if _now() > end:
            raise BrokerUnavailable(f"group {group} could not be reserved in time")


async def terms_of(cluster: Cluster, group: str, *, timeout: float) -> Terms:
    """Return what counts for the share group *group*; what may not be read is taken as it is with Kafka's own settings.

    Raises:
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    end = _now() + timeout
    try:
        found = await settings(cluster, group, timeout=_left(end))
    except AuthorizationError:
        return Terms("share")
    if LIMIT not in found:  # 4.2: not a group's own, but the brokers'
        try:
            found |= await settings_of_broker(cluster, (f"group.{LIMIT}", f"group.{WINDOW}"), timeout=_left(end))
        except AuthorizationError:
            logger.debug("group %s: how often its records may be delivered may not be read", group)
    default = Terms("share")
    return Terms(
        "share",
        int(found.get(LIMIT) or found.get(f"group.{LIMIT}") or default.limit),
        int(found[LOCK]) / _SECOND if LOCK in found else None,
        int(found.get(WINDOW) or found.get(f"group.{WINDOW}") or default.window),
    )


# ---------------------------------------------------------------------- classic


async def _begin_classic(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> None:
    """Make the group a classic one that begins where the topic does."""
    group = queue.name
    begins = await bounds(cluster, info, timeout=_left(end))
    looked = _now()
    stored = await committed(cluster, group, info.name, range(len(info.partitions)), _left(end))
    if any(note is not None for note in stored.values()) or _now() - looked > _FRESH:
        return
    starts = {number: (start, "") for number, (start, _) in begins.items()}
    try:
        await store_start(cluster, group, info.name, starts, _left(end))
    except AuthorizationError:
        raise
    except BrokerError as error:
        if isinstance(error, BrokerUnavailable) or await engine_of(cluster, group, timeout=_left(end)) is not None:
            return  # somebody else was first
        raise other_kind(group) from error


# ---------------------------------------------------------------------- share


async def _begin_share(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> None:
    """Make the group a share group that begins where the topic does, with settings as the queue has them."""
    group = queue.name
    # Its settings first: whoever finds the group finds them complete.
    if await _from_the_start(cluster, group, end) is None:
        await _configure(cluster, queue, end)
    begins = await bounds(cluster, info, timeout=_left(end))
    looked = _now()
    if await describe(cluster, group, timeout=_left(end)) is not None or _now() - looked > _FRESH:
        return
    try:
        starts = {number: start for number, (start, _) in begins.items()}
        await begin(cluster, group, info.name, starts, timeout=_left(end))
    except ConfigError as error:
        if isinstance(error, NotOffered) or await engine_of(cluster, group, timeout=_left(end)) is None:
            raise  # else somebody else was first, with the other engine


async def _begin_rest(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> None:
    """Let a share group begin where the topic does in partitions that it has not read yet.

    There are some where partitions were added, where the topic was deleted and made again, and where others have made the
    group.
    """
    group, numbers = queue.name, range(len(info.partitions))
    found = await places(cluster, group, info.name, numbers, timeout=_left(end))
    unread = [number for number in numbers if found.get(number, Place(-1, -1)).start < 0]
    if not unread:
        return
    denied = await _from_the_start(cluster, group, end)
    begins = await bounds(cluster, info, unread, timeout=_left(end))
    starts = {number: start for number, (start, _) in begins.items()}
    if await begin(cluster, group, info.name, starts, timeout=_left(end)) or denied is None:
        return
    # Live members begin by the group's settings.
    try:
        wrong = (await settings(cluster, group, timeout=_left(end))).get(RESET) != "earliest"
    except AuthorizationError:
        return  # whoever has made the group was asked the same
    if wrong:
        raise denied


async def _from_the_start(cluster: Cluster, group: str, end: float) -> AuthorizationError | None:
    """Let members of *group* begin with the first record of what they have not read; return why that may not be said."""
    try:
        refused = await set_one(cluster, group, RESET, "earliest", timeout=_left(end))
    except AuthorizationError as error:
        return error
    if refused is not None:
        raise refused
    return None


async def _configure(cluster: Cluster, queue: AnyQueue, end: float) -> None:
    """Set what is better otherwise than brokers have it; some know fewer settings, and each has its own bounds."""
    group = queue.name
    try:
        await _lock_for(cluster, group, round(await _lease(cluster, queue, end) * _SECOND), end)
        await _as_much(cluster, group, LIMIT, MOST_DELIVERIES, 5, end)
        await _as_much(cluster, group, WINDOW, WIDEST, 2000, end)
        await set_one(cluster, group, RENEW, "true", timeout=_left(end))
        # What others have written in a transaction that was given up was never sent.
        await set_one(cluster, group, ISOLATION, "read_committed", timeout=_left(end))
    except AuthorizationError as error:
        logger.debug("group %s keeps the settings of its brokers: %s", group, error)


async def _lease(cluster: Cluster, queue: AnyQueue, end: float) -> float:
    """Return the lease that *queue* was made with: who declares it later alters nothing."""
    try:
        found = await lease_at_birth(cluster, queue, cluster.settings.shown, timeout=_left(end))
    except AuthorizationError:
        found = None
    return queue.lease if found is None else found


async def _lock_for(cluster: Cluster, group: str, wanted: int, end: float) -> None:
    """Set how long a record stays with a silent member: as long as *wanted*, or what the brokers take next to it."""
    if await _set(cluster, group, LOCK, wanted, end):
        return
    for anchor in _ANCHORS:
        if await takes(cluster, group, LOCK, anchor, timeout=_left(end)):
            await _set(cluster, group, LOCK, await _nearest(cluster, group, LOCK, anchor, wanted, end), end)
            return


async def _as_much(cluster: Cluster, group: str, name: str, most: int, usual: int, end: float) -> None:
    """Set a number as high as the brokers take it, up to *most*; below *usual* nothing is set."""
    if await _set(cluster, group, name, most, end):
        return
    if await takes(cluster, group, name, usual, timeout=_left(end)):
        await _set(cluster, group, name, await _nearest(cluster, group, name, usual, most, end), end)


async def _nearest(cluster: Cluster, group: str, name: str, taken: int, refused: int, end: float) -> int:
    """Return the value next to *refused* that brokers take, as they take *taken*."""
    while abs(taken - refused) > 1:
        between = (taken + refused) // 2
        if await takes(cluster, group, name, between, timeout=_left(end)):
            taken = between
        else:
            refused = between
    return taken


async def takes(cluster: Cluster, group: str, name: str, value: int, *, timeout: float) -> bool:
    """Return whether the brokers would take a setting of *group*.

    Raises:
        AuthorizationError: it may not be set.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    return await set_one(cluster, group, name, str(value), timeout=timeout, trying=True) is None


async def _set(cluster: Cluster, group: str, name: str, value: int, end: float) -> bool:
    return await set_one(cluster, group, name, str(value), timeout=_left(end)) is None


async def lease_of(cluster: Cluster, group: str, wanted: float, *, timeout: float) -> float | None:
    """Return how long a record stays with a silent member of the share group *group*.

    That is *wanted* also where it is what the brokers have made of that number.

    Raises:
        AuthorizationError: its settings may not be read.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    end = _now() + timeout
    found = (await settings(cluster, group, timeout=_left(end))).get(LOCK)
    if found is None:
        return None
    lock, asked = int(found), round(wanted * _SECOND)
    if lock == asked:
        return wanted
    try:
        refused = not await takes(cluster, group, LOCK, asked, timeout=_left(end))
        step = 1 if asked > lock else -1
        same = refused and not await takes(cluster, group, LOCK, lock + step, timeout=_left(end))
    except AuthorizationError:
        lowest, highest = 15_000, 60_000  # of brokers that are set up as usual
        same = min(max(asked, lowest), highest) == lock
    return wanted if same else lock / _SECOND


def _now() -> float:
    return asyncio.get_running_loop().time()


def _left(end: float) -> float:
    return max(PAUSE, end - _now())
