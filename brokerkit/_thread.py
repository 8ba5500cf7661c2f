"""The event loop of a process that is not async: one thread, shared by the blocking facade and by Celery."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import Any

import anyio
from anyio.from_thread import BlockingPortal

_inherited: list[Any] = []
"""What a child process got by its fork, kept so that nothing of it is ever finalized: it is the parent's."""


class LoopThread:
    """An event loop in a thread that does not keep the process from ending; it runs while it has users."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: in the child of a fork the thread is the parent's."""
        self._lock = threading.Lock()
        self._users = 0
        self._portal: BlockingPortal | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def forked(self) -> None:
        """Begin anew in a child process, and let nothing that it does reach the parent's connections."""
        loop = self._loop
        if loop is not None:
            _inherited.append((self._portal, loop, self._thread, asyncio.all_tasks(loop)))
            _let_go(loop)
        self.forget()

    def enter(self) -> BlockingPortal:
        """Return the way into the loop, which runs until the last user left."""
        with self._lock:
            if self._portal is None:
                started: Future[tuple[BlockingPortal, asyncio.AbstractEventLoop]] = Future()
                self._thread = threading.Thread(target=_run, args=(started,), name="brokerkit loop", daemon=True)
                self._thread.start()
                self._portal, self._loop = started.result()
            self._users += 1
            return self._portal

    def leave(self) -> None:
        """End the loop if this was its last user."""
        with self._lock:
            self._users -= 1
            if self._users or self._portal is None or self._thread is None:
                return
            self._portal.start_task_soon(self._portal.stop, True)
            self._thread.join()
            self._portal = self._loop = self._thread = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, for who has entered."""
        assert self._loop is not None
        return self._loop


def _run(started: Future[tuple[BlockingPortal, asyncio.AbstractEventLoop]]) -> None:
    async def main() -> None:
        async with BlockingPortal() as portal:
            started.set_result((portal, asyncio.get_running_loop()))
            await portal.sleep_until_stopped()

    anyio.run(main, backend="asyncio")


def _let_go(loop: asyncio.AbstractEventLoop) -> None:
    """Put /dev/null in the place of every descriptor of *loop* in this process.

    The connections are shared with the parent, and so is the list that epoll keeps of them: without this, a socket that the
    child happens to close could be taken off the parent's list, and a server would see no end of a parent that was killed.
    """
    selector: Any = getattr(loop, "_selector", None)
    if selector is None:
        return
    descriptors = list(selector.get_map() or ())
    try:
        descriptors.append(selector.fileno())
    except (AttributeError, OSError, ValueError):
        pass  # poll() and select() have none of their own
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for descriptor in descriptors:
            os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)


LOOP = LoopThread()
"""The one of this process."""
os.register_at_fork(after_in_child=LOOP.forked)
