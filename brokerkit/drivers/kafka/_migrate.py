"""Moving a queue from a classic group to a share group.

A share group begins at one offset of each partition, and a classic group may have done much beyond its position.  So what
is not done below the highest offset that was ever handed out is stored once more behind the end, then the log is cut there:
it says itself where the share group begins.  Each step may be repeated after a crash, which may repeat messages that were in
the middle of it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import anyio
import msgspec
from kio.schema.errors import ErrorCode

from ...address import AnyQueue
from ...driver import Receipt, Record
from ...errors import BrokerError, BrokerUnavailable, CapabilityError, ConfigError
from .._log import Tracker
from ._assign import Claim, Share
from ._cluster import PAUSE, Cluster, loop_time, time_left
from ._context import Context
from ._coordinator import OFFSETS, ask, commit_codes, commit_error, committed, moved
from ._cut import cut
from ._engine import decide
from ._errors import RETRY, of_code
from ._look import Look, bounds
from ._member import Member
from ._progress import undone
from ._records import due, record_of
from ._remove import delete_groups
from ._share_group import describe, offered
from ._view import TopicInfo

logger = logging.getLogger("brokerkit")

_SESSION: Final = 30.0
"""Seconds for which whoever moves a queue is a member of its group: as long as nobody else can be one."""
_LEAVING: Final = 3.0
_AT_ONCE: Final = 100
"""Messages that are stored once more in one call."""
_ROOM: Final = 8 * 1024 * 1024
"""Bytes of them."""


async def migrate(context: Context, queue: AnyQueue, *, timeout: float) -> None:
    """Move *queue*; one that a share group serves stays as it is.

    Raises:
        CapabilityError: the cluster has no share groups.
        ConfigError: the group has members.
        AuthorizationError: the user may not read the queue, cut it or delete its group.
        NotFound: there is no such queue.
        BrokerUnavailable: it was not done within *timeout* seconds; it can be done again.
    """
    cluster, group = context.cluster, queue.name
    end = loop_time() + timeout
    info = await cluster.topic(group, timeout=timeout, fresh=True)
    if not await offered(cluster, group, timeout=time_left(end)):
        raise CapabilityError(f"migrate: {context.settings.shown} has no share groups to move {queue!r} to")
    found = await describe(cluster, group, timeout=time_left(end))
    if found is not None and found.engine == "classic":
        if found.members:
            raise _live(queue, len(found.members))
        await _empty(context, queue, info, end)
        failed = (await delete_groups(cluster, [group], timeout=time_left(end))).get(group)
        if isinstance(failed, ConfigError):
            raise _live(queue) from failed
        if failed is not None:
            raise failed
    if await decide(cluster, queue, info, timeout=time_left(end)) != "share":
        raise _live(queue)


def _live(queue: AnyQueue, count: int = 0) -> ConfigError:
    return ConfigError(
        f"the group of {queue!r} has {count or 'some'} live members; stop them first"
        " (one that died counts until its session has ended)"
    )


async def _empty(context: Context, queue: AnyQueue, info: TopicInfo, end: float) -> None:
    """Leave nothing undone below the position of the classic group."""
    cluster = context.cluster
    member = Member(queue.name, info.name)
    try:
        # Nobody else is one meanwhile: who wants to waits for us.
        await _join(cluster, member, queue, end)
        numbers = range(len(info.partitions))
        notes = await committed(cluster, queue.name, info.name, numbers, time_left(end))
        begins = await bounds(cluster, info, timeout=time_left(end))
        highs: dict[int, int] = {}
        for number, note in notes.items():
            tracker = Tracker(begins[number][0]) if note is None else Tracker.decode(*note)
            tracker.skip(tracker.base, begins[number][0])
            tracker.crashed()
            await _check(cluster, member, queue, end)
            await _copy(context, queue, info, number, tracker, end)
            highs[number] = tracker.high
            await _commit(cluster, member, number, tracker.high, end)
    finally:
        await _sign_off(cluster, member)
    await cut(cluster, info, highs, timeout=time_left(end))


async def _copy(context: Context, queue: AnyQueue, info: TopicInfo, number: int, tracker: Tracker, end: float) -> None:
    """Store what is not done below `Tracker.high` once more, with all that is known of it."""
    rest = undone(tracker)
    if not rest:
        return
    look = Look(context.cluster, info, end, records=len(rest))
    look.begin(number, min(rest), max(rest) + 1)
    pending: list[Record] = []
    size = 0
    while (native := await look.first(number)) is not None:
        look.pop(number)
        if native.offset not in rest:
            continue
        record = record_of(queue, number, native)
        then = due(native)
        record = msgspec.structs.replace(
            record,
            # Waiting for the whole of it once more is never too early, and it is less than a second.
            delay=0.0 if then is None else max(0.0, then - native.timestamp / 1000),
            attempts=max(record.attempts, tracker.attempts(native.offset)),
            deliveries=record.deliveries + tracker.deliveries(native.offset),
        )
        pending.append(record)
        size += len(record.body or b"")
        if len(pending) >= _AT_ONCE or size > _ROOM:
            await _store(context, pending, end)
            size = 0
    await _store(context, pending, end)


async def _store(context: Context, pending: list[Record], end: float) -> None:
    while pending:
        results = await context.outboxes.copy(pending, time_left(end))
        failed = [
            (record, result) for record, result in zip(pending, results, strict=True) if not isinstance(result, Receipt)
        ]
        pending[:] = [record for record, _ in failed]
        for _, error in failed:
            if not error.retryable or loop_time() > end:
                raise error


# ---------------------------------------------------------------------- being a member


async def _join(cluster: Cluster, member: Member, queue: AnyQueue, end: float) -> None:
    """Become the only member."""
    while True:
        answer = await _ask(cluster, member, member.join(Claim(), _SESSION), end)
        code = answer.error_code
        member.id = answer.member_id or member.id
        if code is ErrorCode.member_id_required:
            continue
        if code is ErrorCode.unknown_member_id:
            member.forget()
            continue
        if code is not ErrorCode.none:
            raise of_code(int(code), f"READ on group {member.group}")
        member.generation = int(answer.generation_id)
        if answer.leader != answer.member_id or len(answer.members) != 1:
            raise _live(queue)
        answer = await _ask(cluster, member, member.sync({member.id: Share()}), end)
        if answer.error_code is ErrorCode.rebalance_in_progress:
            raise _live(queue)
        if answer.error_code is not ErrorCode.none:
            raise of_code(int(answer.error_code), f"READ on group {member.group}")
        return


async def _check(cluster: Cluster, member: Member, queue: AnyQueue, end: float) -> None:
    """Stay a member, and see that we still are."""
    answer = await _ask(cluster, member, member.beat(), end)
    if answer.error_code not in {ErrorCode.none, ErrorCode.rebalance_in_progress}:  # the latter: somebody waits for us
        raise BrokerUnavailable(f"migrate: {queue!r} was not moved, as its group went on without us; try again")


async def _commit(cluster: Cluster, member: Member, number: int, high: int, end: float) -> None:
    while True:
        answer = await ask(
            cluster, member.group, member.commit({number: (high, "")}), timeout=min(time_left(end), 6.0), line=OFFSETS
        )
        code = commit_codes(answer)[number]
        if code is ErrorCode.none:
            return
        error = commit_error(code, member.group, member.topic)
        if code not in RETRY or code is ErrorCode.rebalance_in_progress or loop_time() > end:
            raise error
        moved(cluster, member.group, code)
        await asyncio.sleep(PAUSE)


async def _ask(cluster: Cluster, member: Member, request: object, end: float) -> Any:
    """Return an answer that is no passing trouble of the coordinator's."""
    while True:
        answer = await ask(cluster, member.group, request, timeout=time_left(end), line=member)
        code = answer.error_code
        if code not in RETRY or code is ErrorCode.rebalance_in_progress:
            return answer
        if loop_time() > end:
            raise of_code(int(code), f"READ on group {member.group}")
        moved(cluster, member.group, code)
        await asyncio.sleep(PAUSE)


async def _sign_off(cluster: Cluster, member: Member) -> None:
    """Be no member any more: the others need not wait until the session has ended."""
    if member.id:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_LEAVING):
            try:
                await ask(cluster, member.group, member.leave(), timeout=_LEAVING, line=member)
            except BrokerError as error:
                logger.debug("group %s was not left: %s", member.group, error)
    cluster.drop(member)
