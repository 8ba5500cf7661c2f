"""One handler and what it subscribes to: what a service keeps, and what runs it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from .address import AnyQueue, AnyTopic
from .policy import Batch, EveryReplica, RetryPolicy, Start


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """One handler and what it subscribes to."""

    address: AnyTopic | AnyQueue
    handler: Callable[..., object]
    name: str
    group: str | EveryReplica | None
    start: Start | None
    concurrency: int
    prefetch: int
    retry: RetryPolicy
    max_deliveries: int
    timeout: float | None
    batch: Batch | None
    wants_resources: bool
    plain: bool
    """A ``def``: it runs in a thread."""


class Member(msgspec.Struct, frozen=True):
    """A service among those that run together."""

    name: str
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None
    registrations: Sequence[Registration]
