"""What the coordinator of a share group keeps: its members, its positions and its settings."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import msgspec
from kio.schema.errors import ErrorCode

from ...errors import AuthorizationError, BrokerError, ConfigError
from ._api import schema
from ._cluster import Cluster
from ._configs import BROKER, GROUP, configs, insist
from ._coordinator import persist
from ._errors import of_code

logger = logging.getLogger("brokerkit")

Engine: TypeAlias = Literal["share", "classic"]
"""Which kind of group hands out a queue's messages."""
RESET: Final = "share.auto.offset.reset"
LOCK: Final = "share.record.lock.duration.ms"
LIMIT: Final = "share.delivery.count.limit"
WINDOW: Final = "share.partition.max.record.locks"
ISOLATION: Final = "share.isolation.level"
RENEW: Final = "share.renew.acknowledge.enable"
_SET: Final = 0
_UNSET: Final = 1
_OURS: Final = (RESET, LOCK, LIMIT, WINDOW, RENEW, ISOLATION)

_alter = schema("AlterShareGroupOffsets")
_classic = schema("DescribeGroups")
_offsets = schema("DescribeShareGroupOffsets")
_incremental = schema("IncrementalAlterConfigs")
_share = schema("ShareGroupDescribe")


class NotOffered(ConfigError):
    """The cluster has no share groups: it is too old, or they are switched off."""


class Place(msgspec.Struct, frozen=True):
    """How far a share group is in a partition."""

    start: int
    """Nothing below it is left to do; -1 until the group has stored something."""
    lag: int
    """How many records are not done; -1 where that is not known, as after `start`."""


class Described(msgspec.Struct, frozen=True):
    """What a coordinator says of a group."""

    engine: Engine
    members: tuple[str, ...]


async def describe(cluster: Cluster, group: str, *, timeout: float) -> Described | None:
    """Return what *group* is, None if there is none of that name.

    Raises:
        AuthorizationError: the group may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    return (await look_up(cluster, group, timeout=timeout))[0]


async def look_up(cluster: Cluster, group: str, *, timeout: float) -> tuple[Described | None, bool]:
    """Return the same, and whether the cluster has share groups.

    Raises:
        AuthorizationError: the group may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    found = await _as_share(cluster, group, timeout)
    has = found is not None and found.error_code is not ErrorCode.unsupported_version
    if found is not None and found.error_code is ErrorCode.none:
        return Described("share", tuple(f"{one.member_id} at {one.client_host}" for one in found.members)), has
    request = _classic.DescribeGroupsRequest(groups=(group,), include_authorized_operations=False)
    (found,) = (await _asked(cluster, group, request, _of_groups, timeout)).groups
    if found.error_code not in {ErrorCode.none, ErrorCode.group_id_not_found}:
        raise of_code(int(found.error_code), f"DESCRIBE on group {group}")
    if found.error_code is not ErrorCode.none or found.group_state in {"Dead", ""}:
        return None, has
    members = (f"{one.group_instance_id or one.member_id} at {one.client_host}" for one in found.members)
    return Described("classic", tuple(members)), has


async def offered(cluster: Cluster, group: str, *, timeout: float) -> bool:
    """Return whether the cluster has share groups: new enough, and not switched off.

    Raises:
        AuthorizationError: *group*, which is asked about to find out, may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    found = await _as_share(cluster, group, timeout)
    return found is not None and found.error_code is not ErrorCode.unsupported_version


async def _as_share(cluster: Cluster, group: str, timeout: float) -> Any:
    """Return what is said about the share group *group*; None where there cannot be any."""
    if not await cluster.shares(timeout=timeout):
        return None
    request = _share.ShareGroupDescribeRequest(group_ids=(group,), include_authorized_operations=False)
    (found,) = (await _asked(cluster, group, request, _of_groups, timeout)).groups
    if found.error_code not in {ErrorCode.none, ErrorCode.group_id_not_found, ErrorCode.unsupported_version}:
        raise of_code(int(found.error_code), f"DESCRIBE on group {group}", found.error_message)
    return found


def _of_groups(answer: Any) -> list[ErrorCode]:
    return [entry.error_code for entry in answer.groups]


async def _asked(cluster: Cluster, group: str, request: object, codes: Any, timeout: float) -> Any:
    return await persist(cluster, group, request, codes, f"asking about group {group}", timeout)


async def places(
    cluster: Cluster, group: str, topic: str, partitions: Collection[int], *, timeout: float
) -> dict[int, Place]:
    """Return how far the share group *group* is in *partitions* of *topic*; those of which it knows nothing are missing.

    Raises:
        AuthorizationError: the group or the topic may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """

    def codes(answer: Any) -> list[ErrorCode]:
        parts = (part for one in answer.groups for entry in one.topics for part in entry.partitions)
        return [*(one.error_code for one in answer.groups), *(part.error_code for part in parts)]

    request = _offsets.DescribeShareGroupOffsetsRequest(
        groups=(
            _offsets.DescribeShareGroupOffsetsRequestGroup(
                group_id=group,
                topics=(
                    _offsets.DescribeShareGroupOffsetsRequestTopic(topic_name=topic, partitions=tuple(partitions)),
                ),
            ),
        ),
    )
    answer = await persist(cluster, group, request, codes, f"reading the position of group {group}", timeout)
    found: dict[int, Place] = {}
    for one in answer.groups:
        if one.error_code is ErrorCode.group_id_not_found:
            return {}
        if one.error_code is not ErrorCode.none:
            raise of_code(int(one.error_code), f"DESCRIBE on group {group}", one.error_message)
        for part in (part for entry in one.topics if entry.topic_name == topic for part in entry.partitions):
            if part.error_code is ErrorCode.unknown_topic_or_partition:
                continue
            if part.error_code is not ErrorCode.none:
                raise of_code(int(part.error_code), f"DESCRIBE on topic {topic}", part.error_message)
            found[int(part.partition_index)] = Place(int(part.start_offset), int(part.lag))
    return found


async def begin(cluster: Cluster, group: str, topic: str, starts: Mapping[int, int], *, timeout: float) -> bool:
    """Let the share group *group*, which is made by this, begin at *starts*; return whether it has no members.

    Only partitions that it has never read begin where this says.

    Raises:
        NotOffered: the cluster has no share groups.
        AuthorizationError: the group or the topic may not be read.
        ConfigError: there is a group of that name, of another kind.
        BrokerUnavailable: no answer within *timeout* seconds; it may be done.
    """

    def codes(answer: Any) -> list[ErrorCode]:
        return [answer.error_code, *(part.error_code for entry in answer.responses for part in entry.partitions)]

    request = _alter.AlterShareGroupOffsetsRequest(
        group_id=group,
        topics=(
            _alter.AlterShareGroupOffsetsRequestTopic(
                topic_name=topic,
                partitions=tuple(
                    _alter.AlterShareGroupOffsetsRequestPartition(partition_index=number, start_offset=start)
                    for number, start in starts.items()
                ),
            ),
        ),
    )
    answer = await persist(cluster, group, request, codes, f"storing the position of group {group}", timeout)
    if answer.error_code is ErrorCode.non_empty_group:
        return False
    if answer.error_code is ErrorCode.unsupported_version:
        raise NotOffered(f"group {group}: the cluster has no share groups")
    if answer.error_code is ErrorCode.group_id_not_found:
        raise other_kind(group)
    if answer.error_code is not ErrorCode.none:
        raise of_code(int(answer.error_code), f"READ on group {group}", answer.error_message)
    for part in (part for entry in answer.responses for part in entry.partitions):
        if part.error_code is not ErrorCode.none:
            raise of_code(int(part.error_code), f"READ on topic {topic}", part.error_message)
    return True


def other_kind(group: str) -> ConfigError:
    """Return the error for a group that neither kind of queue can use."""
    return ConfigError(
        f"group {group} exists on the cluster and is of another kind; remove it, or take another name or prefix"
    )


async def settings(cluster: Cluster, group: str, *, timeout: float) -> dict[str, str]:
    """Return the settings of *group* that its brokers know, as they count.

    Raises:
        AuthorizationError: they may not be read.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    return _values(await configs(cluster, GROUP, group, None, f"group {group}", timeout))


async def settings_of_broker(cluster: Cluster, names: Sequence[str], *, timeout: float) -> dict[str, str]:
    """Return those of *names* that are settings of a broker, which groups have for want of their own.

    Raises:
        AuthorizationError: they may not be read.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    if not cluster.brokers:
        await cluster.refreshed(timeout)
    node = min(cluster.brokers)
    return _values(await configs(cluster, BROKER, str(node), names, "the cluster", timeout, node))


def _values(found: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(config.value) for name, config in found.items()}


async def set_one(
    cluster: Cluster, group: str, name: str, value: str | None, *, timeout: float, trying: bool = False
) -> BrokerError | None:
    """Set one setting of *group*, or with None take it back; return why the brokers do not, if so.  *trying* changes nothing.

    Raises:
        AuthorizationError: it may not be set.
        BrokerUnavailable: no answer within *timeout* seconds; it may be set.
    """
    return await set_all(cluster, group, {name: value}, timeout=timeout, trying=trying)


async def set_all(
    cluster: Cluster, group: str, values: Mapping[str, str | None], *, timeout: float, trying: bool = False
) -> BrokerError | None:
    """Do the same with several settings: all of them or none.

    Raises:
        AuthorizationError: they may not be set.
        BrokerUnavailable: no answer within *timeout* seconds; they may be set.
    """

    def code(answer: Any) -> Any:
        return answer.responses[0]

    request = _incremental.IncrementalAlterConfigsRequest(
        resources=(
            _incremental.AlterConfigsResource(
                resource_type=GROUP,
                resource_name=group,
                configs=tuple(
                    _incremental.AlterableConfig(
                        name=name, config_operation=_UNSET if value is None else _SET, value=value
                    )
                    for name, value in values.items()
                ),
            ),
        ),
        validate_only=trying,
    )
    try:
        await insist(cluster, request, code, f"ALTER_CONFIGS on group {group}", timeout)
    except ConfigError as error:
        return error
    return None


async def forget(cluster: Cluster, group: str, *, timeout: float) -> None:
    """Take back the settings of a group that is gone, as far as that is allowed: they would outlive it.

    Raises:
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    if not await cluster.shares(timeout=timeout):
        return
    try:
        known = await settings(cluster, group, timeout=timeout)
        await set_all(cluster, group, {name: None for name in _OURS if name in known}, timeout=timeout)
    except AuthorizationError as error:
        logger.debug("group %s: its settings stay: %s", group, error)
