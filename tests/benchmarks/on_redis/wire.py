"""The physical limit: one blocking socket, hiredis, no asyncio."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ..job import RATE
from ..on_servers.client import GROUP, dumps
from .raw import BLOCK, CONSUMER, Streams


class Wire:
    """A socket that writes commands together and reads their replies."""

    def __init__(self, url: str) -> None:
        import hiredis

        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self.pack: Any = hiredis.pack_command

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, commands: Sequence[bytes]) -> list[Any]:
        """Send *commands* in one write and return all replies."""
        self._socket.sendall(b"".join(commands))
        replies: list[Any] = []
        gets, feed, receive = self._reader.gets, self._reader.feed, self._socket.recv
        while len(replies) < len(commands):
            reply = gets()
            if reply is False:
                feed(receive(1 << 18))
            elif isinstance(reply, Exception):
                raise reply
            else:
                replies.append(reply)
        return replies


class HiredisSocket(Streams):
    """What one thread can do at all."""

    name = "hiredis-socket"
    note = (
        "physical limit: blocking, no asyncio, json. XADD one at a time, 100 commands per write (100 tasks), 1000 per write "
        "(many); consuming: XREADGROUP COUNT 100 written together with the acknowledgements of the batch before: an XACK per "
        "message (one handler) or per batch (100)"
    )

    async def fill(self) -> None:
        await self.prepare()
        with Wire(self.job.url) as wire:
            self._publish(wire, [vars(value) for value in self.job.stock()], 1000)

    async def run(self) -> None:
        job, work = self.job, self.work
        with Wire(job.url) as wire:
            if work.stores:
                items = [vars(value) for value in job.values()]
                job.begin()
                self._publish(wire, items, 1000 if work.batch > 1 else work.handlers)
                job.stop()
                return
            got = self.got()
            if work.metric == "latency":
                await self.prepare()
            job.drain()
            job.ready()
            name, pack = job.entity, wire.pack
            read = pack(("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", 100, "BLOCK", BLOCK, "STREAMS", name, ">"))
            acks: list[bytes] = []
            deadline = time.monotonic() + 60
            while len(job.seen) < job.n and time.monotonic() < deadline:
                reply = wire.call([*acks, read])[-1]
                page = reply[0][1] if reply else []
                for _, fields in page:
                    got(json.loads(fields[1]))
                if work.handlers == 1:
                    acks = [pack(("XACK", name, GROUP, at)) for at, _ in page]
                else:
                    acks = [pack(("XACK", name, GROUP, *[at for at, _ in page]))] if page else []
            if acks:
                wire.call(acks)

    async def feed(self) -> None:
        with Wire(self.job.url) as wire:
            time.sleep(0.2)
            due = time.monotonic()
            for value in self.job.values():
                time.sleep(max(0.0, due - time.monotonic()))
                due += 1 / RATE
                value.t = time.monotonic_ns()
                self._publish(wire, [vars(value)], 1)

    def _publish(self, wire: Wire, items: Sequence[Any], together: int) -> None:
        name, pack = self.job.entity, wire.pack
        for at in range(0, len(items), together):
            wire.call([pack(("XADD", name, "*", "d", dumps(item))) for item in items[at : at + together]])
