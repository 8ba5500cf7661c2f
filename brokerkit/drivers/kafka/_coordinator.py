"""What a group's coordinator keeps: positions with their notes, and who the members are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from kio.schema.errors import ErrorCode

from ...errors import BrokerError, BrokerUnavailable
from ._api import schema
from ._cluster import PAUSE, Cluster
from ._errors import RETRY, STALE_COORDINATOR, of_code

OFFSETS: Final = "offsets"
"""The line of requests about positions: they wait for copies to be written, which membership must not wait for."""
ATTEMPT: Final = 6.0
"""Seconds after which a coordinator that owes an answer counts as dead: it gives up by itself after five."""
_LIVE: Final = frozenset({
    ErrorCode.unknown_member_id, ErrorCode.illegal_generation, ErrorCode.rebalance_in_progress,
    ErrorCode.fenced_instance_id,
})  # fmt: skip
"""Answers to a commit that is no member's, while there are members."""

_describe = schema("DescribeGroups")
_commit = schema("OffsetCommit")
_fetch = schema("OffsetFetch")


async def ask(cluster: Cluster, group: str, request: object, *, timeout: float, line: object) -> Any:
    """Send *request* to the coordinator of *group* once; one that does not answer is looked up anew the next time.

    Raises:
        AuthorizationError: the group may not be described.
        BrokerUnavailable: it was not sent.
        Unanswered: it was sent, and no answer came in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    node = await cluster.coordinator(group, timeout=timeout)
    try:
        return await cluster.call(node, request, timeout=max(0.001, end - loop.time()), line=line)
    except BrokerUnavailable:
        cluster.forget_coordinator(group)
        raise


def moved(cluster: Cluster, group: str, code: ErrorCode) -> None:
    """Look the coordinator of *group* up anew if *code*, its answer, says that it is none any more."""
    if code in STALE_COORDINATOR:
        cluster.forget_coordinator(group)


async def persist(
    cluster: Cluster,
    group: str,
    request: object,
    codes: Callable[[Any], Collection[ErrorCode]],
    what: str,
    timeout: float,
) -> Any:
    """Return the first answer without an error that goes away by itself.

    *codes* returns the errors in an answer, and *what* is done, for texts.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    problem: BrokerError = BrokerUnavailable(f"{what}: no answer in time")
    pause = PAUSE
    while (left := end - loop.time()) > 0:
        try:
            answer = await ask(cluster, group, request, timeout=min(left, ATTEMPT), line=OFFSETS)
        except BrokerUnavailable as error:
            problem = error
        else:
            passing = [code for code in codes(answer) if code in RETRY]
            if not passing:
                return answer
            moved(cluster, group, passing[0])
            problem = of_code(int(passing[0]), what)
        await asyncio.sleep(max(0.0, min(pause, end - loop.time())))
        pause = min(2 * pause, 0.5)
    raise problem


async def committed(
    cluster: Cluster, group: str, topic: str, partitions: Collection[int], timeout: float
) -> dict[int, tuple[int, str] | None]:
    """Return where *group* is in each of *partitions*, with the note beside it; None where nothing is stored.

    Raises:
        AuthorizationError: the group or the topic may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    if not partitions:
        return {}
    request = _fetch.OffsetFetchRequest(
        group_id=group,
        topics=(_fetch.OffsetFetchRequestTopic(name=topic, partition_indexes=tuple(sorted(partitions))),),
        require_stable=True,
    )

    def codes(answer: Any) -> list[ErrorCode]:
        return [answer.error_code, *(part.error_code for entry in answer.topics for part in entry.partitions)]

    answer = await persist(cluster, group, request, codes, f"reading the position of group {group}", timeout)
    if answer.error_code is not ErrorCode.none:
        raise of_code(int(answer.error_code), f"DESCRIBE on group {group}")
    found: dict[int, tuple[int, str] | None] = dict.fromkeys(partitions)
    for part in (part for entry in answer.topics if entry.name == topic for part in entry.partitions):
        if part.error_code is not ErrorCode.none:
            raise of_code(int(part.error_code), f"DESCRIBE on topic {topic}")
        if part.committed_offset >= 0:
            found[int(part.partition_index)] = (int(part.committed_offset), part.metadata or "")
    return found


def commit_request(
    group: str,
    topic: str,
    offsets: Mapping[int, tuple[int, str]],
    *,
    generation: int = -1,
    member: str = "",
    instance: str | None = None,
) -> Any:
    """Return the request that stores *offsets*, with a note beside each."""
    return _commit.OffsetCommitRequest(
        group_id=group,
        generation_id_or_member_epoch=generation,
        member_id=member,
        group_instance_id=instance,
        topics=(
            _commit.OffsetCommitRequestTopic(
                name=topic,
                partitions=tuple(
                    _commit.OffsetCommitRequestPartition(
                        partition_index=partition, committed_offset=offset, committed_metadata=note
                    )
                    for partition, (offset, note) in offsets.items()
                ),
            ),
        ),
    )


def commit_codes(answer: Any) -> dict[int, ErrorCode]:
    """Return what the coordinator said about each partition."""
    return {int(part.partition_index): part.error_code for entry in answer.topics for part in entry.partitions}


def commit_error(code: ErrorCode, group: str, topic: str) -> BrokerError:
    """Return the error for *code*, the answer to a commit."""
    if code is ErrorCode.group_authorization_failed:
        return of_code(int(code), f"READ on group {group}")
    return of_code(int(code), f"READ on topic {topic}")


async def store_start(
    cluster: Cluster, group: str, topic: str, offsets: Mapping[int, tuple[int, str]], timeout: float
) -> bool:
    """Store where *group*, which has no members, is in *topic*; return whether it has none.

    Raises:
        AuthorizationError: the group or the topic may not be read.
        NotFound: there is no such topic or partition.
        BrokerUnavailable: no answer within *timeout* seconds; it may be stored.
    """
    if not offsets:
        return True

    def codes(answer: Any) -> list[ErrorCode]:
        return list(commit_codes(answer).values())

    request = commit_request(group, topic, offsets)
    answer = await persist(cluster, group, request, codes, f"storing the position of group {group}", timeout)
    for code in codes(answer):
        if code in _LIVE:
            return False
        if code is not ErrorCode.none:
            raise commit_error(code, group, topic)
    return True


async def members(cluster: Cluster, group: str, timeout: float) -> list[str]:
    """Return the live members of *group*, as its operator would look for them.

    Raises:
        AuthorizationError: the group may not be described.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    request = _describe.DescribeGroupsRequest(groups=(group,), include_authorized_operations=False)

    def codes(answer: Any) -> list[ErrorCode]:
        return [entry.error_code for entry in answer.groups]

    answer = await persist(cluster, group, request, codes, f"looking for the members of group {group}", timeout)
    found: list[str] = []
    for entry in answer.groups:
        if entry.error_code not in {ErrorCode.none, ErrorCode.group_id_not_found}:
            raise of_code(int(entry.error_code), f"DESCRIBE on group {group}")
        found += [f"{one.group_instance_id or one.member_id} at {one.client_host}" for one in entry.members]
    return found
