"""The Redis that is measured on: a process of its own, empty before each row."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..frame import Backend


def client(url: str) -> Any:
    """Return a blocking client."""
    import redis

    return redis.Redis.from_url(url)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Start Debian's redis-server without persistence and yield its URL."""
    # Not in the processes that are measured: one of them has an older redis-py.
    from ...servers import ADMIN, RedisServer

    with RedisServer(passwords={ADMIN: ""}) as server:
        yield f"redis://{server.host}:{server.port}/0"


def version() -> str:
    """Return what the server's program says of itself."""
    from ...servers import program

    told = subprocess.run([program("redis"), "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return f"redis-server {told.partition('v=')[2].split()[0]}, no persistence"


def clean(url: str) -> None:
    """Empty it."""
    with client(url) as asking:
        asking.flushall()


def info(url: str) -> Mapping[str, Any]:
    """Return what the server says of itself."""
    with client(url) as asking:
        found: Mapping[str, Any] = asking.info("everything")
        return found


REDIS: Final = Backend(name="redis", serve=serve, clean=clean)
