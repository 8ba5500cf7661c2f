"""Noticing that no broker answers any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ...errors import BrokerError
from ._cluster import Cluster

CUT_OFF: Final = 30.0
"""Most seconds without an answer of any broker until `receive` says so; a session that is shorter has ended by then."""
_LOOKS: Final = 5


async def watch(cluster: Cluster, session: float, fail: Callable[[BrokerError], None]) -> None:
    """Tell *fail* when no broker has answered for *session* seconds, or for so long that nobody would wait; until cancelled."""
    tick = min(session, CUT_OFF) / _LOOKS
    silent = 0
    while True:
        await asyncio.sleep(tick)
        silent = 0 if cluster.problem is None else silent + 1
        if silent >= _LOOKS and cluster.problem is not None:
            error = type(cluster.problem)(f"no broker answers: {cluster.problem}")
            error.__cause__ = cluster.problem
            fail(error)
