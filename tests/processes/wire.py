"""Frames of pickled calls, with addresses rebuilt on the other side."""

from __future__ import annotations

import asyncio
import io
import pickle
from typing import Any

from brokerkit.address import Address, DeadLetters, Queue, Topic, letters_of

_QUEUE = ("priorities", "dedup", "lease", "owned")


def _topic(name: str, partitions: int, retention: float | None, owned: bool) -> Address:
    return Topic("any", bytes, partitions=partitions, retention=retention, owned=owned)._named(name)


def _queue(name: str, answers: bool, options: dict[str, Any]) -> Address:
    if answers:
        del options["dedup"]
        return Queue("any", bytes, reply=bytes, **options)._named(name)
    return Queue("any", bytes, **options)._named(name)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Topic):
            return _topic, (obj.name, obj.partitions, obj.retention, obj.owned)
        if isinstance(obj, Queue):
            return _queue, (obj.name, obj.reply is not None, {name: getattr(obj, name) for name in _QUEUE})
        if isinstance(obj, DeadLetters):
            return letters_of, (obj.of, obj.group)
        return NotImplemented


def write(stream: asyncio.StreamWriter, frame: object) -> None:
    """Send a frame."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(frame)
    body = buffer.getvalue()
    stream.write(len(body).to_bytes(4, "big") + body)


async def read(stream: asyncio.StreamReader) -> Any:
    """Return the next frame; raises `asyncio.IncompleteReadError` at the end."""
    size = int.from_bytes(await stream.readexactly(4), "big")
    return pickle.loads(await stream.readexactly(size))
