"""Removing the beginning of a log from the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from kio.schema.errors import ErrorCode

from ...errors import BrokerError, BrokerUnavailable, NotFound
from ._api import schema
from ._cluster import PAUSE, Cluster, time_left
from ._errors import RETRY, STALE_LEADER, of_code
from ._view import TopicInfo

ALL: Final = -1
"""Everything that is there when the broker is asked."""
_TRY: Final = 5.0
"""Seconds that one request may take."""
_requests = schema("DeleteRecords")


async def cut(cluster: Cluster, info: TopicInfo, below: Mapping[int, int], *, timeout: float) -> dict[int, int]:
    """Remove the records below an offset from each partition in *below*; return where the logs begin by then.

    An offset behind the end of the log removes nothing.

    Raises:
        NotFound: the topic does not exist any more.
        AuthorizationError: nothing may be removed from it.
        BrokerUnavailable: a partition has no leader that answered in time; others are cut by then.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    left, starts = dict(below), dict[int, int]()
    id = info.id
    problem: BrokerError | None = None
    while left:
        nodes: dict[int, dict[int, int]] = {}
        for partition, offset in left.items():
            nodes.setdefault(info.leader(partition), {})[partition] = offset
        nodes.pop(-1, None)
        for node, parts in nodes.items():
            patience = max(PAUSE, min(_TRY, end - loop.time()))
            try:
                answer = await cluster.call(node, _request(info.name, parts, patience), timeout=patience)
            except BrokerUnavailable as error:
                problem = error
                continue
            for part in (part for entry in answer.topics for part in entry.partitions):
                index, code = int(part.partition_index), part.error_code
                if code in {ErrorCode.none, ErrorCode.offset_out_of_range}:
                    left.pop(index, None)
                    starts[index] = int(part.low_watermark)
                    continue
                problem = of_code(int(code), f"DELETE on topic {info.name}")
                if code not in RETRY and code not in STALE_LEADER:
                    raise problem
        if left:
            if loop.time() + PAUSE >= end:
                raise BrokerUnavailable(f"{info.name}[{min(left)}] has no leader that answers") from problem
            await asyncio.sleep(PAUSE)
            info = await cluster.topic(info.name, timeout=time_left(end), fresh=True)
            if info.id != id:
                raise NotFound(f"topic {info.name} was deleted and made again")
    return starts


def _request(name: str, below: Mapping[int, int], timeout: float) -> object:
    return _requests.DeleteRecordsRequest(
        topics=(
            _requests.DeleteRecordsTopic(
                name=name,
                partitions=tuple(
                    _requests.DeleteRecordsPartition(partition_index=partition, offset=offset)
                    for partition, offset in below.items()
                ),
            ),
        ),
        timeout=timedelta(seconds=timeout),
    )
