"""What brokers do by themselves while a play goes on: on a busy machine they take one another for dead."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

from ..servers.kafka import KafkaCluster, Refused
from .stage import Stage
from .trouble import Fault

Leaders: TypeAlias = Mapping[str, Mapping[int, int]]
EVERY: Final = 0.3
AFTER: Final = 3.0
"""Seconds after a fault of the play in which what was moved by it comes to rest."""
KEPT: Final = ("__consumer_offsets", "__share_group_state")


@asynccontextmanager
async def watched(stage: Stage, cluster: KafkaCluster, names: Sequence[str]) -> AsyncGenerator[None]:
    """Note as a fault when topics called *names*, or what groups are kept in, get other leaders, and no fault moves them."""
    task = asyncio.get_running_loop().create_task(_watch(stage, cluster, [*names, *KEPT]))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _watch(stage: Stage, cluster: KafkaCluster, names: Sequence[str]) -> None:
    before: Leaders = {}
    since = time.monotonic()
    while True:
        begin = time.monotonic()
        leaders = await asyncio.to_thread(_leaders, cluster, names)
        now = time.monotonic()
        moved = any(
            leader != leaders.get(name, {}).get(index, leader)
            for name, places in before.items()
            for index, leader in places.items()
        )
        planned = any(fault.moves and fault.begin <= now and since <= fault.end + AFTER for fault in stage.faults)
        if moved and not planned:
            stage.faults.append(Fault(what="brokers that took one for dead", begin=since, end=now, moves=True))
        if leaders:
            before, since = {**before, **leaders}, begin
        await asyncio.sleep(EVERY)


def _leaders(cluster: KafkaCluster, names: Sequence[str]) -> Leaders:
    try:
        with cluster.endpoints.wire() as admin:
            return {name: places for name, places in admin.cluster(names).topics.items() if places}
    except (OSError, Refused):
        return {}
