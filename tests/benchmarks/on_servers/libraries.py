"""Other libraries, as far as they are used alike on all servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from .client import Client, Got, Publisher


class FastStreamClient(Client):
    """FastStream, whatever it publishes to."""

    peer = True

    def broker(self) -> Any:
        """Return the broker."""
        raise NotImplementedError

    def subscribe(self, broker: Any) -> Any:
        """Return the decorator of handlers."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        broker = self.broker()

        # A dict is what it decodes quickest to.
        async def handle(value: dict[str, Any]) -> None:
            got(value)

        self.subscribe(broker)(handle)
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()


class TaskiqClient(Client):
    """taskiq, whatever it publishes to."""

    peer = True
    least = 200

    def broker(self) -> Any:
        """Return the broker."""
        raise NotImplementedError

    def task(self, got: Got) -> tuple[Any, Any]:
        """Return the broker and its task."""
        logging.disable(logging.WARNING)
        broker = self.broker()

        async def handle(value: dict[str, Any]) -> None:
            got(value)

        return broker, broker.task(task_name="bench")(handle)

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        broker, task = self.task(lambda value: None)
        await broker.startup()
        try:
            yield Publisher(task.kiq, lambda items: asyncio.gather(*[task.kiq(item) for item in items]))
        finally:
            await broker.shutdown()

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from taskiq.acks import AcknowledgeType
        from taskiq.receiver import Receiver

        broker, _ = self.task(got)
        broker.is_worker_process = True
        await broker.startup()
        receiver = Receiver(
            broker,
            max_async_tasks=self.work.handlers,
            run_startup=False,
            ack_type=AcknowledgeType.WHEN_EXECUTED,
        )
        finish = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(receiver.listen(finish))
            try:
                yield
            finally:
                finish.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(listening, 8)
                await broker.shutdown()
