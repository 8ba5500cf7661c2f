"""Keeps Celery's prefork pool from forgetting tasks that a process of it has already been given.

When its consumer closes (a warm shutdown, a lost connection), the pool forgets each job whose beginning no process has
reported.  One that was written to a process runs all the same: it would come to another worker as well, and its process would
wait for 30 s to be heard before it ends.  What is written is kept here like what runs, and acknowledged as usual.
"""

from __future__ import annotations

import sys
from typing import Any

from celery import signals as _signals

from ._bridge import Bridge

signals: Any = _signals


def watch() -> None:
    """Have the pool of every worker of this process, on this transport, keep what it has written."""
    signals.worker_ready.connect(_ready, weak=False, dispatch_uid="brokerkit: what the pool has written")


def _ready(sender: Any = None, **_: object) -> None:
    pools: Any = sys.modules.get("celery.concurrency.asynpool")
    connection = getattr(sender, "connection", None)
    if pools is None or connection is None or not isinstance(getattr(connection.transport, "bridge", None), Bridge):
        return
    pool = sender.pool
    if isinstance(getattr(pool, "_pool", None), pools.AsynPool) and not isinstance(pool.flush, Flush):
        pool.flush = Flush(pool._pool)


class Flush:
    """`AsynPool.flush`, but for what is written."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __call__(self) -> None:
        """Forget what no process has been given."""
        pool = self._pool
        written = [job for job in pool._cache.values() if not job._accepted and _given(job)]
        for job in written:
            job.discard = _keep
        try:
            pool.flush()
        finally:
            for job in written:
                del job.discard
                if _given(job):
                    pool._busy_workers.add(job._write_to.inqW_fd)  # nothing else is written to it before it is done
                else:
                    job.discard()


def _given(job: Any) -> bool:
    return job._write_to is not None and job._write_to._is_alive()


def _keep() -> None:
    """Stand in for ``job.discard``."""
