"""``python -m tests.faults.start JSON``: start a worker, with an `Order` in JSON.

It ends when it is told to (SIGTERM), and is killed when the process that has started it is gone.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from importlib import import_module
from typing import Literal

import msgspec


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to do."""

    role: Literal["producer", "service", "hand"]
    name: str
    url: str
    folder: str
    """Where its journal goes."""
    seed: int
    lease: float
    of: tuple[str, ...] = ("queue", "topic")
    """What there is to publish and to consume."""
    skew: float = 0.0
    """Seconds by which the wall clock of this process is wrong."""
    keys: int = 3
    pause: float = 0.04
    """Mean seconds between two messages of a key."""
    timeout: float = 3.0
    """Of publishing."""
    delays: tuple[float, float] = (0.05, 0.5)
    """Least and most seconds that a message of the queue waits which is delayed."""
    delayed: float = 0.15
    """Which part of them is."""
    work: float = 0.01
    """Mean seconds that a handler takes."""
    limit: int = 10
    """How often a message may be delivered without an outcome."""
    deadly: Literal["", "queue", "topic"] = ""
    """Of which the first message of each key ends the process that handles it."""


def end_with_the_parent() -> None:
    """Have the kernel kill this process when the one that has started it dies, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    end_with_the_parent()
    order = msgspec.json.decode(sys.argv[1], type=Order)
    if order.skew:
        real = time.time
        time.time = lambda: real() + order.skew
    import_module("tests.faults.worker").main(order)  # not before: everybody takes the clock as it is then


if __name__ == "__main__":
    main()
