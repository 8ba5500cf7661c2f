"""OPTIONS of addresses: a setting is kept and compared, or refused; see `_options.OPTIONS`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ...errors import BrokerError, ConfigError, NotFound
from ...message import Message
from ._harness import Harness, Kind
from ._options import works
from ._runner import Suite


class Upside:
    """A codec that writes text backwards."""

    content_type = "text/backwards"

    def encode(self, value: str, /) -> bytes:
        return value[::-1].encode()

    def decode(self, body: bytes, headers: object, /) -> str:
        return body.decode()[::-1]


class AddressOptions(Suite):
    async def declared(self, system: Harness, option: str, kind: Kind, value: object) -> None:
        """Declare an address with a setting and find it again, or see it refused."""
        name = option.partition(".")[2]
        error = works(system, option, kind)
        make: Callable[..., Any] = system.topic if kind == "topic" else system.queue
        async with system.connect() as broker:
            declare: Callable[[], Awaitable[None]] = lambda: broker.declare(make(**{name: value}))  # noqa: E731
            if error is not None:
                with pytest.raises(error):
                    await declare()
                return
            await declare()
        async with system.connect(declare="check") as broker:
            await broker.publish(make(**{name: value}), "value")
        async with system.connect(declare="check") as broker:
            with pytest.raises(BrokerError, match=name):
                await broker.publish(make(), "value")

    async def test_address_partitions(self, system: Harness, kind: Kind) -> None:
        """A topic is made with so many, and a program that says otherwise is told."""
        await self.declared(system, "address.partitions", kind, 7)

    async def test_address_retention(self, system: Harness, kind: Kind) -> None:
        """A topic is made with it, and a program that says otherwise is told."""
        await self.declared(system, "address.retention", kind, 4000.0)

    async def test_address_priorities(self, system: Harness, kind: Kind) -> None:
        """A queue is made with so many levels, and a program that says otherwise is told."""
        await self.declared(system, "address.priorities", kind, 4)

    async def test_address_dedup(self, system: Harness, kind: Kind) -> None:
        """A queue is made with its window, and a program that says otherwise is told."""
        await self.declared(system, "address.dedup", kind, 90.0)

    async def test_address_lease(self, system: Harness, kind: Kind) -> None:
        """A queue is made with it, and a program that says otherwise is told."""
        await self.declared(system, "address.lease", kind, 77.0)

    async def test_address_codec(self, system: Harness, kind: Kind) -> None:
        """Bodies are what the codec makes of values."""
        make: Callable[..., Any] = system.topic if kind == "topic" else system.queue
        address = make(codec=Upside())
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.publish(address, "value")
            (message,) = await system.take(messages, 1)
            assert (message.value, message.body) == ("value", b"eulav")
            await message.ack()

    async def test_address_owned(self, system: Harness, kind: Kind) -> None:
        """What others own is neither created nor deleted, but used; a prefix does not count for it."""
        make: Callable[..., Any] = system.topic if kind == "topic" else system.queue
        foreign = make(system.connect().prefix + kind, owned=False)
        async with system.connect() as broker:
            with pytest.raises(NotFound):
                await broker.publish(foreign, "value")
            with pytest.raises(ConfigError):
                await broker.declare(foreign)
        async with system.connect() as broker:
            await broker.declare(make(kind))
        async with system.connect() as broker:
            await broker.publish(foreign, "value")
            with pytest.raises(ConfigError):
                await broker.delete(foreign)
            async with system.subscribe(broker, foreign) as messages:
                assert [m.value for m in await system.drain(messages)] == ["value"]

    async def asking(self, system: Harness, kind: Kind, **options: Any) -> None:
        make: Callable[..., Any] = system.topic if kind == "topic" else system.queue
        if kind == "topic":
            with pytest.raises(TypeError):
                make(reply=str, **options)
            return

        async def answer(message: Message[str]) -> str:
            return message.value * 2

        queue = make(reply=str, **options)
        async with system.connect() as broker, system.serve(broker, queue, answer):
            assert await broker.request(queue, "ab", timeout=system.deadline) == "abab"

    async def test_address_reply(self, system: Harness, kind: Kind) -> None:
        """A queue that replies answers requests."""
        await self.asking(system, kind)

    async def test_address_reply_codec(self, system: Harness, kind: Kind) -> None:
        """Its answers are what the codec makes of them."""
        await self.asking(system, kind, reply_codec=Upside())
