"""Keeps Celery's prefork pool from forgetting tasks that a process of it has already been given.

When its consumer closes (a warm shutdown, a lost connection), the pool forgets each job whose beginning no process has
reported.  One that was written to a process runs all the same: it would come to another worker as well, and its process would
wait for 30 s to be heard before it ends.  What is written is kept here like what runs, and acknowledged as usual.

What was written in part only is written to its end: a pool that shuts down does not, and its process would wait for the rest
for ever, and the worker for its process.
"""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from typing import Any, Final

from billiard import pool as _billiard
from celery import signals as _signals

from ._bridge import bridge_of

LOOK: Final = 0.5
"""Seconds between two looks whether a process lives that is being written to."""

signals: Any = _signals
billiard: Any = _billiard


def watch() -> None:
    """Have the pool of every worker of this process, on this transport, keep what it has written."""
    signals.worker_ready.connect(_ready, weak=False, dispatch_uid="brokerkit: what the pool has written")


def _ready(sender: Any = None, **_: object) -> None:
    pools: Any = sys.modules.get("celery.concurrency.asynpool")
    if pools is None or bridge_of(sender) is None:
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
        if pool._state == billiard.CLOSE:  # one that runs on does this itself
            for job in list(pool._cache.values()):
                self._finish(job)
        unwritten = {id(job) for job in pool.outbound_buffer}  # with what a process that died has left
        written = [
            (job, job._write_to)
            for job in pool._cache.values()
            if not job._accepted and id(job) not in unwritten and _alive(job._write_to)
        ]
        for job, _ in written:
            job.discard = _keep
        try:
            pool.flush()
        finally:
            for job, process in written:
                del job.discard
                if job._write_to is process and _alive(process):
                    pool._busy_workers.add(process.inqW_fd)  # nothing else is written to it before it is done
                else:
                    job.discard()

    def _finish(self, job: Any) -> None:
        """Write the rest of *job*, if a part is written: its process has nothing else to do than to read it."""
        pool, process = self._pool, job._write_to
        if process is None or job._accepted or (writer := job._writer()) not in pool._active_writers:
            return
        poll = select.poll()
        poll.register(process.inqW_fd, select.POLLOUT)
        while writer in pool._active_writers and _alive(process) and pool._state == billiard.CLOSE:
            if poll.poll(LOOK * 1000):
                with suppress(StopIteration, OSError, EOFError):
                    next(writer)


def _alive(process: Any) -> bool:
    return process is not None and process._is_alive()


def _keep() -> None:
    """Stand in for ``job.discard``."""
