"""``python -m tests.processes.server``: serve memory on a free port of this machine, whose number is printed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from brokerkit.driver import Consumer, Delivery, Driver, Settlement
from brokerkit.drivers import load
from brokerkit.errors import BrokerError

from . import wire

SESSION = 2.0
"""Seconds after which the partitions of a dead client go to another."""


class Client:
    """One connection: calls come in, answers go out, consumers live in tasks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, driver: Driver) -> None:
        self.reader = reader
        self.writer = writer
        self.driver = driver
        self.numbers = itertools.count(1)
        self.held: dict[int, Delivery] = {}
        self.consumers: dict[int, Consumer] = {}
        self.leaving: dict[int, asyncio.Event] = {}
        self.left: dict[int, asyncio.Event] = {}

    async def serve(self) -> None:
        """Answer calls until the client says farewell, or is gone."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    number, method, args = await wire.read(self.reader)
                except (asyncio.IncompleteReadError, ConnectionError):
                    faults: Any = getattr(self.driver, "faults")  # noqa: B009 - only the memory driver has them
                    faults.cut()
                    break
                if method == "farewell":
                    wire.write(self.writer, (number, True, None))
                    break
                tasks.create_task(self.answer(tasks, number, method, args))
            for leaving in self.leaving.values():
                leaving.set()

    async def answer(self, tasks: asyncio.TaskGroup, number: int, method: str, args: Sequence[Any]) -> None:
        try:
            result: object
            if method == "consume":
                result = await self.consume(tasks, *args)
            else:
                result = await getattr(self, f"do_{method}")(*args)
            wire.write(self.writer, (number, True, result))
        except BrokerError as error:
            error.__cause__ = None
            wire.write(self.writer, (number, False, error))

    async def do_driver(self, method: str, args: Sequence[Any], options: dict[str, Any]) -> object:
        return await getattr(self.driver, method)(*args, **options)

    async def consume(self, tasks: asyncio.TaskGroup, source: Any, prefetch: int) -> int:
        number = next(self.numbers)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tasks.create_task(self.live(number, source, prefetch, ready))
        await ready
        return number

    async def live(self, number: int, source: Any, prefetch: int, ready: asyncio.Future[None]) -> None:
        leaving, left = self.leaving[number], self.left[number] = asyncio.Event(), asyncio.Event()

        async def revoked(deliveries: Sequence[Delivery]) -> None:
            """Ignored: in these tests nothing is moved away from a consumer that lives."""

        try:
            async with self.driver.consume(source, prefetch=prefetch, revoked=revoked) as consumer:
                self.consumers[number] = consumer
                ready.set_result(None)
                await leaving.wait()
        except BrokerError as error:
            if not ready.done():
                ready.set_exception(error)
        finally:
            left.set()

    async def do_leave(self, number: int) -> None:
        self.leaving[number].set()
        await self.left[number].wait()

    async def do_prefetch(self, number: int, prefetch: int) -> None:
        self.consumers[number].prefetch = prefetch

    async def do_receive(self, number: int, limit: int, timeout: float) -> tuple[list[Delivery], bool]:
        consumer = self.consumers[number]
        shown = []
        for delivery in await consumer.receive(limit, timeout):
            token = next(self.numbers)
            self.held[token] = delivery
            shown.append(msgspec.structs.replace(delivery, token=token, native=None))
        return shown, consumer.ended

    async def do_settle(self, number: int, items: Sequence[Settlement], confirm: bool) -> list[BrokerError | None]:
        real = [Settlement(self.real(item.delivery), item.publish) for item in items]
        return list(await self.consumers[number].settle(real, confirm=confirm))

    async def do_release(self, number: int, deliveries: Sequence[Delivery]) -> None:
        await self.consumers[number].release([self.real(delivery) for delivery in deliveries])

    async def do_hold(self, number: int, delivery: Delivery, attempts: int) -> None:
        await self.consumers[number].hold(self.real(delivery), attempts)

    def real(self, delivery: Delivery) -> Delivery:
        assert isinstance(delivery.token, int)
        return self.held[delivery.token]


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one client."""
    driver = load("memory://shared", {"session": SESSION}, lambda event: None).driver
    async with driver:
        await Client(reader, writer, driver).serve()
    writer.close()


async def main() -> None:
    """Serve until the process ends."""
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
