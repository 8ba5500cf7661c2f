"""Creating topics, with the settings of their addresses."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Final, cast

from kio.schema.errors import ErrorCode

from ...address import Address, AnyQueue, AnyTopic, DeadLetters, Queue, Topic
from ...errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError, NotFound
from ._api import schema
from ._cluster import PAUSE, Cluster
from ._errors import of_code
from ._share_group import offered
from ._tiers import TIERS, is_waiting, tiered
from ._topic_settings import LARGEST, LEASE
from ._view import TopicInfo

LARGEST_COPY: Final = 64 * 1024 * 1024
"""``max.message.bytes`` where copies go: what was accepted once, from whatever client, has to be accepted again."""
AGAIN_PARTITIONS: Final = 4
"""Partitions of a group's redrive queue."""
SHARED_PARTITIONS: Final = 4
"""Partitions of a queue where share groups serve it: any number of consumers takes part."""
CLASSIC_PARTITIONS: Final = 32
"""The same where it is as many consumers as partitions at most."""
_FOREVER: Final = 9e15
"""Seconds whose milliseconds Kafka cannot count."""
_TRY: Final = 5.0
"""Seconds that one call to create a topic may take."""
_HEARD: Final = 2.0
"""Seconds in which brokers hear of a topic that was created."""
_create_topics = schema("CreateTopics")


async def partitions_of(cluster: Cluster, address: Address, *, timeout: float) -> int:
    """Return how many partitions the topic of *address* is created with.

    Raises:
        BrokerUnavailable: what depends on the cluster could not be found out within *timeout* seconds.
    """
    if isinstance(address, Topic):
        topic: AnyTopic = address
        return topic.partitions
    if isinstance(address, DeadLetters):
        return 1
    if is_waiting(address):
        return len(TIERS)
    if not tiered(address):
        return AGAIN_PARTITIONS
    if wanted := cluster.settings.queue_partitions:
        return wanted
    try:
        shared = await offered(cluster, address.name, timeout=timeout)
    except AuthorizationError:  # a publisher needs no group
        shared = await cluster.shares(timeout=timeout)
    return SHARED_PARTITIONS if shared else CLASSIC_PARTITIONS


def _configs(address: Address) -> dict[str, str]:
    if isinstance(address, Topic):
        topic: AnyTopic = address
        seconds = math.inf if topic.retention is None else topic.retention
        retention = round(seconds * 1000) if seconds < _FOREVER else -1
        return {"cleanup.policy": "delete", "retention.ms": str(retention), "max.message.bytes": str(LARGEST)}
    configs = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    configs["max.message.bytes"] = str(LARGEST_COPY)
    if isinstance(address, Queue):
        queue: AnyQueue = address
        configs["message.timestamp.type"] = "LogAppendTime"
        if tiered(queue):
            configs[LEASE] = str(round(queue.lease * 1000))
    return configs


async def create(cluster: Cluster, address: Address, *, timeout: float) -> TopicInfo:
    """Create the topic of *address* if it is missing, and return it when all its partitions have leaders.

    Raises:
        AuthorizationError: topics may not be created.
        ConfigError: the cluster cannot create it with these settings.
        BrokerUnavailable: it was not there after *timeout* seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    name = address.name
    problem: BrokerError | None = None
    again = loop.time()
    while (left := end - loop.time()) > 0:
        try:
            info = await cluster.topic(name, timeout=left, fresh=True)
            if all(place.leader >= 0 for place in info.partitions):
                return info
        except NotFound:
            if loop.time() >= again:
                problem = await _ask(cluster, address, min(left, _TRY))
                again = loop.time() + (_HEARD if problem is None else 0)
        except BrokerUnavailable as error:
            problem = error
        await asyncio.sleep(PAUSE)
    raise problem or BrokerUnavailable(f"topic {name} has no leaders after {timeout:g} s")


async def _ask(cluster: Cluster, address: Address, timeout: float) -> BrokerError | None:
    """Ask for the topic; return why it may be missing still, where asking again makes sense."""
    try:
        partitions = await partitions_of(cluster, address, timeout=timeout)
    except BrokerUnavailable as error:
        return error
    request = _create_topics.CreateTopicsRequest(
        topics=(
            _create_topics.CreatableTopic(
                name=address.name,
                num_partitions=partitions,
                replication_factor=cluster.settings.replication,
                assignments=(),
                configs=tuple(
                    _create_topics.CreatableTopicConfig(name=key, value=value)
                    for key, value in _configs(address).items()
                ),
            ),
        ),
        timeout=timedelta(seconds=timeout),
    )
    try:
        answer = await cluster.call(cluster.controller, request, timeout=timeout)
    except BrokerUnavailable as error:
        return error
    (result,) = answer.topics
    code = cast("ErrorCode", result.error_code)
    if code in {ErrorCode.none, ErrorCode.topic_already_exists}:
        return None
    refusal = of_code(int(code), f"CREATE on topic {address.name}", result.error_message)
    if code.retriable:
        return refusal
    if code in {ErrorCode.invalid_replication_factor, ErrorCode.invalid_partitions, ErrorCode.invalid_config}:
        raise ConfigError(f"{address!r} cannot be created: {result.error_message or refusal}")
    raise refusal
