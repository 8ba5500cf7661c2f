"""Which kind of group serves a queue, and what goes with it.

The group of a queue has the queue's own name, and its type in the cluster says which engine serves the queue: brokers refuse
to let a share group be used as a classic one, and the other way round.  So two processes never serve one queue by different
engines, whatever each of them knows or may do.
"""

from __future__ import annotations

import msgspec

from ...address import AnyQueue
from ._cluster import Cluster, TopicInfo
from ._share_group import Engine


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
    raise NotImplementedError


async def reserve(cluster: Cluster, queue: AnyQueue, info: TopicInfo, *, timeout: float) -> Terms:
    """Return how *queue*, whose topic is *info*, is served; if nothing serves it yet, decide that.

    Raises:
        AuthorizationError: the user lacks a right that the queue's engine takes.
        ConfigError: a group of the queue's name is used by others.
        BrokerUnavailable: it was not done within *timeout* seconds.
    """
    raise NotImplementedError
