"""Removing topics and groups."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, Final, cast

from kio.schema.errors import ErrorCode

from ...errors import BrokerError, BrokerUnavailable, ConfigError
from ._api import schema
from ._cluster import PAUSE, Cluster
from ._errors import RETRY, STALE_COORDINATOR, of_code

_TRY: Final = 10.0
"""Seconds that one request may take."""
_SOON: Final = 3.0
"""The same where brokers now and then owe an answer for good: about a group whose topic has just gone."""
_AT_ONCE: Final = 100
"""Topics, or groups, in one request."""
_delete_groups = schema("DeleteGroups")
_delete_topics = schema("DeleteTopics")
_list_groups = schema("ListGroups")
_metadata = schema("Metadata")


async def topics_like(cluster: Cluster, beginning: str, *, timeout: float) -> list[str]:
    """Return the topics that are seen whose names begin so."""
    request = _metadata.MetadataRequest(
        topics=None, allow_auto_topic_creation=False, include_topic_authorized_operations=False
    )
    answer = await cluster.call(None, request, timeout=timeout)
    return sorted(str(topic.name) for topic in answer.topics if str(topic.name or "").startswith(beginning))


async def groups_like(cluster: Cluster, beginning: str, *, timeout: float) -> list[str]:
    """Return the groups that are seen whose names begin so; brokers that do not answer are passed over."""
    answers = await asyncio.gather(
        *(_call(cluster, node, _list_groups.ListGroupsRequest(), timeout) for node in list(cluster.brokers))
    )
    found = {str(group.group_id) for answer in answers if answer is not None for group in answer.groups}
    return sorted(group for group in found if group.startswith(beginning))


async def _call(cluster: Cluster, node: int, request: Any, timeout: float) -> Any:
    try:
        return await cluster.call(node, request, timeout=timeout)
    except BrokerUnavailable:
        return None


async def delete_topics(cluster: Cluster, names: Sequence[str], *, timeout: float) -> None:
    """Delete topics, and return when no broker shows them any more.  What is missing already is no error.

    Raises:
        AuthorizationError: one of them may not be deleted; others may be gone by then.
        ConfigError: the cluster deletes no topics.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    for start in range(0, len(names), _AT_ONCE):
        left = list(names[start : start + _AT_ONCE])
        problem: BrokerError = BrokerUnavailable(f"topic {left[0]} could not be deleted in time")
        while left:
            if loop.time() >= end:
                raise problem
            try:
                left, found = await _delete_some(cluster, left, min(_TRY, end - loop.time()))
            except BrokerUnavailable as error:  # whatever became of it, asking again does no harm
                found = error
                cluster.stale()  # the controller may be another broker by now
            problem = found or problem
            if left:
                await asyncio.sleep(PAUSE)
    await _gone(cluster, names, end)


async def _delete_some(cluster: Cluster, names: Sequence[str], timeout: float) -> tuple[list[str], BrokerError | None]:
    """Delete topics, and return those for which it has to be asked again, and why."""
    request = _delete_topics.DeleteTopicsRequest(topic_names=tuple(names), timeout=timedelta(seconds=timeout))
    answer = await cluster.call(cluster.controller, request, timeout=timeout)
    again: list[str] = []
    problem: BrokerError | None = None
    for result in answer.responses:
        code = cast("ErrorCode", result.error_code)
        if code in {ErrorCode.none, ErrorCode.unknown_topic_or_partition}:
            continue
        problem = of_code(int(code), f"DELETE on topic {result.name}", result.error_message)
        if code not in RETRY:
            raise problem
        again.append(str(result.name))
    return again, problem


async def _gone(cluster: Cluster, names: Sequence[str], end: float) -> None:
    """Return when all brokers that answer have heard of it."""
    loop = asyncio.get_running_loop()
    waiting = set(cluster.brokers)
    for start in range(0, len(names), _AT_ONCE):
        request = _metadata.MetadataRequest(
            topics=tuple(
                _metadata.MetadataRequestTopic(topic_id=None, name=name) for name in names[start : start + _AT_ONCE]
            ),
            allow_auto_topic_creation=False,
            include_topic_authorized_operations=False,
        )
        for node in waiting:
            while (left := end - loop.time()) > 0:
                answer = await _call(cluster, node, request, min(left, _TRY))
                if answer is None or all(topic.error_code is not ErrorCode.none for topic in answer.topics):
                    break
                await asyncio.sleep(PAUSE)
    if (left := end - loop.time()) > 0:
        await cluster.refreshed(left)


async def delete_groups(cluster: Cluster, names: Collection[str], *, timeout: float) -> dict[str, BrokerError]:
    """Delete groups, and return those for which it failed.  What is missing already is no error."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    failed: dict[str, BrokerError] = {}
    for name in names:
        if (error := await _delete_group(cluster, name, end)) is not None:
            failed[name] = error
    return failed


async def _delete_group(cluster: Cluster, name: str, end: float) -> BrokerError | None:
    loop = asyncio.get_running_loop()
    request = _delete_groups.DeleteGroupsRequest(groups_names=(name,))
    problem: BrokerError = BrokerUnavailable(f"group {name} could not be deleted in time")
    while (left := end - loop.time()) > 0:
        try:
            node = await cluster.coordinator(name, timeout=min(left, _TRY))
            answer = await cluster.call(node, request, timeout=min(left, _SOON))
        except BrokerUnavailable as error:
            problem = error
            cluster.forget_coordinator(name)
        except BrokerError as error:
            return error
        else:
            (result,) = answer.results
            code = cast("ErrorCode", result.error_code)
            if code in {ErrorCode.none, ErrorCode.group_id_not_found}:
                return None
            if code is ErrorCode.non_empty_group:
                return ConfigError(
                    f"group {name} has live members; stop them first (one that died counts until its session has ended)"
                )
            problem = of_code(int(code), f"DELETE on group {name}")
            if code not in RETRY:
                return problem
            if code in STALE_COORDINATOR:
                cluster.forget_coordinator(name)
        await asyncio.sleep(PAUSE)
    return problem
