"""Which kind of group serves a queue, and what goes with it.

The group of a queue has the queue's own name, and its type in the cluster says which engine serves the queue: brokers refuse
to let a share group be used as a classic one, and the other way round.  So two processes never serve one queue by different
engines, whatever each of them knows or may do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final
from weakref import WeakKeyDictionary

import msgspec

from ...address import AnyQueue
from ...errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError
from ._cluster import PAUSE, Cluster, loop_time, time_left
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
    look_up,
    other_kind,
    places,
    set_all,
    set_one,
    settings,
    settings_of_broker,
)
from ._topic_settings import lease_at_birth
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

MOST_DELIVERIES: Final = 10
"""What the brokers should count to before they drop a record: as far as any of them goes by itself."""
LEAST: Final = 2
"""The same, as few as any operator can ask for: what it is where nobody says."""
WIDEST: Final = 10_000
"""Records of the widest window that any broker allows."""
_FRESH: Final = 1.0
"""Seconds for which it is believed that there is no group: whoever was frozen since then looks again."""
_ANCHORS: Final = (30_000, 15_000, 60_000)
"""Milliseconds of a lock, one of which every broker takes that is set up as usual."""
_HEARD: Final = 10.0
"""Seconds in which brokers hear of a setting."""
_SECOND: Final = 1000


class _Known:
    """What is known of the settings of a cluster's groups without asking."""

    __slots__ = ("_set", "lock", "most")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.most: dict[str, str] = {}
        """The highest numbers that brokers take, which it takes a while to find out."""
        self._set: dict[str, tuple[float, dict[str, str]]] = {}
        """When what was set by us: brokers hear of it later than we."""

    def note(self, group: str, values: dict[str, str]) -> None:
        """Note what was set."""
        self._set = {name: entry for name, entry in self._set.items() if loop_time() - entry[0] < _HEARD}
        self._set[group] = loop_time(), values

    def latest(self, group: str) -> dict[str, str]:
        """Return what was set a moment ago."""
        at, values = self._set.get(group, (-_HEARD, {}))
        return values if loop_time() - at < _HEARD else {}


_all_known: WeakKeyDictionary[Cluster, _Known] = WeakKeyDictionary()


def _known_of(cluster: Cluster) -> _Known:
    return _all_known.setdefault(cluster, _Known())


class Terms(msgspec.Struct, frozen=True):
    """How a queue is served."""

    engine: Engine
    limit: int = 5
    """Deliveries that the brokers count before they drop a record; nothing for a classic group."""
    lock: float | None = None
    """Seconds that a record stays with a member that is silent, if that is known before the first is there."""
    window: int = 2000
    """Records of a partition from the oldest that is not done on, behind which the brokers hand out no more."""
    widens: bool = True
    """Whether the brokers begin a partition that is added at its beginning; else what is in it already would be passed over."""


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
    end = loop_time() + timeout
    engine = await decide(cluster, queue, info, timeout=timeout)
    return await terms_of(cluster, queue.name, timeout=time_left(end)) if engine == "share" else Terms(engine)


async def decide(cluster: Cluster, queue: AnyQueue, info: TopicInfo, *, timeout: float) -> Engine:
    """Return what serves *queue* as `reserve` does, and raise the same."""
    end = loop_time() + timeout
    group = queue.name
    problem: BrokerError = BrokerUnavailable(f"group {group} could not be reserved in time")
    while True:
        found, offers = await look_up(cluster, group, timeout=time_left(end))
        try:
            if found is not None:
                if found.engine == "share":
                    await _begin_rest(cluster, queue, info, end)
                return found.engine
            if offers and await _begin_share(cluster, queue, info, end):
                return "share"
            if not offers and await _begin_classic(cluster, queue, info, end):
                return "classic"
        except NotOffered:  # switched off a moment ago
            logger.debug("group %s: the cluster has no share groups any more", group)
        except BrokerUnavailable as error:
            problem = error
            await asyncio.sleep(PAUSE)
        if loop_time() > end:
            raise problem


async def terms_of(cluster: Cluster, group: str, *, timeout: float) -> Terms:
    """Return what counts for the share group *group*.

    Where that may not be read, its records may be dropped as early as any broker does that.

    Raises:
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    end = loop_time() + timeout
    try:
        found = {**await settings(cluster, group, timeout=time_left(end)), **_known_of(cluster).latest(group)}
    except AuthorizationError:
        return Terms("share", limit=LEAST, widens=False)
    if LIMIT not in found:  # 4.2: not a group's own, but the brokers'
        try:
            found |= await settings_of_broker(cluster, (f"group.{LIMIT}", f"group.{WINDOW}"), timeout=time_left(end))
        except AuthorizationError:
            logger.debug("group %s: how often its records may be delivered may not be read", group)
    return Terms(
        "share",
        int(found.get(LIMIT) or found.get(f"group.{LIMIT}") or LEAST),
        int(found[LOCK]) / _SECOND if LOCK in found else None,
        int(found.get(WINDOW) or found.get(f"group.{WINDOW}") or Terms("share").window),
        found.get(RESET) == "earliest",
    )


# ---------------------------------------------------------------------- classic


async def _begin_classic(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> bool:
    """Make the group a classic one that begins where the topic does; return whether it was us."""
    group = queue.name
    begins = await bounds(cluster, info, timeout=time_left(end))
    looked = loop_time()
    stored = await committed(cluster, group, info.name, range(len(info.partitions)), time_left(end))
    if any(note is not None for note in stored.values()) or loop_time() - looked > _FRESH:
        return False
    starts = {number: (start, "") for number, (start, _) in begins.items()}
    try:
        return await store_start(cluster, group, info.name, starts, _soon(end))
    except (AuthorizationError, BrokerUnavailable):
        raise
    except BrokerError as error:
        if await engine_of(cluster, group, timeout=time_left(end)) is None:
            raise other_kind(group) from error
        return False  # somebody else was first


# ---------------------------------------------------------------------- share


async def _begin_share(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> bool:
    """Make the group a share group that begins where the topic does, with settings as the queue has them.

    Return whether it was us.
    """
    group = queue.name
    # Its settings first: whoever finds the group finds them complete.
    await _configure(cluster, queue, end)
    begins = await bounds(cluster, info, timeout=time_left(end))
    looked = loop_time()
    if await describe(cluster, group, timeout=time_left(end)) is not None or loop_time() - looked > _FRESH:
        return False
    starts = {number: start for number, (start, _) in begins.items()}
    try:
        return await begin(cluster, group, info.name, starts, timeout=_soon(end))
    except ConfigError as error:
        if isinstance(error, NotOffered) or await engine_of(cluster, group, timeout=time_left(end)) is None:
            raise
        return False  # somebody else was first, with the other engine


async def _begin_rest(cluster: Cluster, queue: AnyQueue, info: TopicInfo, end: float) -> None:
    """Let a share group begin where the topic does in partitions that it has not read yet.

    There are some where partitions were added, where the topic was deleted and made again, and where others have made the
    group.
    """
    group, numbers = queue.name, range(len(info.partitions))
    found = await places(cluster, group, info.name, numbers, timeout=time_left(end))
    unread = [number for number in numbers if found.get(number, Place(-1, -1)).start < 0]
    if not unread:
        return
    denied = await _from_the_start(cluster, group, end)
    begins = await bounds(cluster, info, unread, timeout=time_left(end))
    starts = {number: start for number, (start, _) in begins.items()}
    if await begin(cluster, group, info.name, starts, timeout=_soon(end)) or denied is None:
        return
    # Live members begin by the group's settings.
    try:
        wrong = (await settings(cluster, group, timeout=time_left(end))).get(RESET) != "earliest"
    except AuthorizationError:
        return  # whoever has made the group was asked the same
    if wrong:
        raise denied


async def _from_the_start(cluster: Cluster, group: str, end: float) -> AuthorizationError | None:
    """Let members of *group* begin with the first record of what they have not read; return why that may not be said."""
    try:
        refused = await set_one(cluster, group, RESET, "earliest", timeout=time_left(end))
    except AuthorizationError as error:
        return error
    if refused is not None:
        raise refused
    return None


async def _configure(cluster: Cluster, queue: AnyQueue, end: float) -> None:
    """Set what is better otherwise than brokers have it, where that is allowed.

    Brokers know more or fewer settings, and each has its own bounds.
    """
    group = queue.name
    known: Mapping[str, str] = {}
    try:
        known = await settings(cluster, group, timeout=time_left(end))
        lock = round(await _lease(cluster, queue, end) * _SECOND)
        # What others have written in a transaction that was given up was never sent.
        wanted = {RESET: "earliest", LOCK: str(lock), RENEW: "true", ISOLATION: "read_committed"}
        wanted |= await _bounds_of(cluster, group, known, end)
        wanted = {name: value for name, value in wanted.items() if name in known}
        if await set_all(cluster, group, wanted, timeout=time_left(end)) is not None:
            wanted[LOCK] = str(await _lock_for(cluster, group, lock, end))
            for name, value in tuple(wanted.items()):
                if await set_one(cluster, group, name, value, timeout=time_left(end)) is not None:
                    del wanted[name]
        _known_of(cluster).note(group, wanted)
    except AuthorizationError as error:
        if known.get(RESET) != "earliest":
            logger.warning(
                "%r: partitions that are added to it while it is consumed are read when all consumers have been left: %s",
                queue,
                error,
            )


async def _bounds_of(cluster: Cluster, group: str, known: Collection[str], end: float) -> dict[str, str]:
    """Return the highest numbers that brokers take: of one queue's group as of any other's."""
    own = _known_of(cluster)
    async with own.lock:
        for name, most, usual in ((LIMIT, MOST_DELIVERIES, 5), (WINDOW, WIDEST, 2000)):
            if name in known and name not in own.most:
                own.most[name] = str(await _most(cluster, group, name, most, usual, end))
        return dict(own.most)


async def _lease(cluster: Cluster, queue: AnyQueue, end: float) -> float:
    """Return the lease that *queue* was made with: who declares it later alters nothing."""
    try:
        found = await lease_at_birth(cluster, queue, cluster.settings.shown, timeout=time_left(end))
    except AuthorizationError:
        found = None
    return queue.lease if found is None else found


async def _lock_for(cluster: Cluster, group: str, wanted: int, end: float) -> int:
    """Return how long brokers let a record stay with a silent member: as long as *wanted*, or what they take next to it."""
    if await takes(cluster, group, LOCK, wanted, timeout=time_left(end)):
        return wanted
    for anchor in _ANCHORS:
        if await takes(cluster, group, LOCK, anchor, timeout=time_left(end)):
            return await _nearest(cluster, group, LOCK, anchor, wanted, end)
    return wanted


async def _most(cluster: Cluster, group: str, name: str, most: int, usual: int, end: float) -> int:
    """Return how high brokers take a number, up to *most*; *usual* where they take neither."""
    if await takes(cluster, group, name, most, timeout=time_left(end)):
        return most
    if not await takes(cluster, group, name, usual, timeout=time_left(end)):
        return usual
    return await _nearest(cluster, group, name, usual, most, end)


async def _nearest(cluster: Cluster, group: str, name: str, taken: int, refused: int, end: float) -> int:
    """Return the value next to *refused* that brokers take, as they take *taken*."""
    while abs(taken - refused) > 1:
        between = (taken + refused) // 2
        if await takes(cluster, group, name, between, timeout=time_left(end)):
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


async def lease_of(cluster: Cluster, group: str, wanted: float, *, timeout: float) -> float | None:
    """Return how long a record stays with a silent member of the share group *group*.

    That is *wanted* also where it is what the brokers have made of that number, which is warned of.

    Raises:
        AuthorizationError: its settings may not be read.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    end = loop_time() + timeout
    found = {**await settings(cluster, group, timeout=time_left(end)), **_known_of(cluster).latest(group)}
    if LOCK not in found:
        return None
    lock, asked = int(found[LOCK]), round(wanted * _SECOND)
    if lock == asked:
        return wanted
    try:
        refused = not await takes(cluster, group, LOCK, asked, timeout=time_left(end))
        step = 1 if asked > lock else -1
        same = refused and not await takes(cluster, group, LOCK, lock + step, timeout=time_left(end))
    except AuthorizationError:
        lowest, highest = 15_000, 60_000  # of brokers that are set up as usual
        same = min(max(asked, lowest), highest) == lock
    if not same:
        return lock / _SECOND
    logger.warning(
        "queue %s: the brokers allow no lease of %g s: %g s count (group.share.%s.record.lock.duration.ms)",
        group,
        wanted,
        lock / _SECOND,
        "max" if asked > lock else "min",
    )
    return wanted


def _soon(end: float) -> float:
    """Return for how long a group may be begun by what was seen of it: by then others may have worked in it and left."""
    return min(time_left(end), _FRESH)
