"""Where messages of a queue wait for their time: one topic beside it, each partition of which delays by the same time.

So each partition is in the order in which things fall due, and whoever reads it never has to look behind its head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from ...address import AnyQueue, Queue, internal

TIERS: Final = (1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)
"""Seconds, by partition."""
DELAY: Final = "delay"


def tier_of(delay: float) -> int:
    """Return where a message waits first that is due in *delay* seconds: never longer than that, where it is a second or more."""
    return max(0, sum(tier <= delay for tier in TIERS) - 1)


def tiered(queue: AnyQueue) -> bool:
    """Return whether delays of *queue* are waited for in a topic of their own: not those of a group's private queue."""
    return ".." not in queue.name


@lru_cache(maxsize=4096)
def _waiting(name: str) -> AnyQueue:
    queue: Queue[Any] = Queue(DELAY, bytes)
    return queue._named(internal(name, DELAY))


def waiting_for(queue: AnyQueue) -> AnyQueue:
    """Return where messages wait that are for *queue*."""
    return _waiting(queue.name)


def is_waiting(queue: AnyQueue) -> bool:
    """Return whether *queue* is one where messages of another wait."""
    return queue.name.endswith(f"..{DELAY}")


def served_by(waiting: AnyQueue) -> str:
    """Return the name of the queue whose messages wait in *waiting*."""
    return waiting.name.removesuffix(f"..{DELAY}")
