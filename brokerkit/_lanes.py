"""Order per key under concurrency: of each key one message is out, later ones wait behind it.

A batch may take several messages of one key, in order; the key is free again when all of them are settled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from .message import Message


class Lanes:
    """The keys that have a message out, and what waits behind them.  Messages without a key never wait."""

    __slots__ = ("_lanes", "_more", "parked", "parked_bytes")

    def __init__(self) -> None:
        self._lanes: dict[bytes, deque[Message[Any]] | None] = {}
        self._more: dict[bytes, int] = {}
        self.parked = 0
        self.parked_bytes = 0

    def enter(self, message: Message[Any]) -> bool:
        """Return whether *message* may go out now; else it waits for its turn."""
        key = message._item.record.key
        if key is None:
            return True
        lanes = self._lanes
        if key not in lanes:
            lanes[key] = None
            return True
        lane = lanes[key]
        if lane is None:
            lanes[key] = deque((message,))
        else:
            lane.append(message)
        self._count(message, 1)
        return False

    def leave(self, message: Message[Any]) -> Message[Any] | None:
        """Say that *message* is settled; return the next of its key, which goes out now."""
        key = message._item.record.key
        if key is None:
            return None
        if self._more and key in self._more:
            if self._more[key] == 1:
                del self._more[key]
            else:
                self._more[key] -= 1
            return None
        lane = self._lanes.pop(key, None)
        if lane is None:
            return None
        following = lane.popleft()
        self._lanes[key] = lane or None
        self._count(following, -1)
        return following

    def follow(self, message: Message[Any]) -> Message[Any] | None:
        """Let the next message of the key of *message*, which is out, go out as well: for a batch."""
        key = message._item.record.key
        lane = None if key is None else self._lanes.get(key)
        if key is None or not lane:
            return None
        following = lane.popleft()
        if not lane:
            self._lanes[key] = None
        self._count(following, -1)
        self._more[key] = self._more.get(key, 0) + 1
        return following

    def put_back(self, message: Message[Any]) -> None:
        """Take back a message that `follow` let out: it waits at the head of its key again."""
        key = message._item.record.key
        assert key is not None
        if self._more[key] == 1:
            del self._more[key]
        else:
            self._more[key] -= 1
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = deque((message,))
        else:
            lane.appendleft(message)
        self._count(message, 1)

    def split(self, messages: Sequence[Message[Any]]) -> list[Message[Any]]:
        """Take back *messages* of a batch, in order, and return those that go out singly now.

        That is the first of each key, unless another message of it is still out: one settled by hand that runs again.
        """
        now: list[Message[Any]] = []
        lines: dict[bytes, list[Message[Any]]] = {}
        for message in messages:
            key = message._item.record.key
            if key is None:
                now.append(message)
            else:
                lines.setdefault(key, []).append(message)
        for key, line in lines.items():
            others = self._more.pop(key, 0) + (key in self._lanes) - len(line)
            if others <= 0:
                now.append(line.pop(0))
            elif others > 1:
                self._more[key] = others - 1
            behind = self._lanes.setdefault(key, None)
            if line:
                self._lanes[key] = deque((*line, *(behind or ())))
            for message in line:
                self._count(message, 1)
        return now

    def abandon(self, message: Message[Any]) -> list[Message[Any]]:
        """Free the key of *message*, which is handed back, and return all that waited behind it: order wants them back too."""
        key = message._item.record.key
        if key is None:
            return []
        self._more.pop(key, None)
        lane = self._lanes.pop(key, None)
        return self._uncount(lane or ())

    def clear(self) -> list[Message[Any]]:
        """Free all keys and return all that waited."""
        waiting = [message for lane in self._lanes.values() if lane for message in lane]
        self._lanes.clear()
        self._more.clear()
        return self._uncount(waiting)

    def remove(self, gone: set[int]) -> list[Message[Any]]:
        """Drop the waiting messages whose delivery has an `id()` in *gone*, and return them."""
        dropped: list[Message[Any]] = []
        for key, lane in self._lanes.items():
            if lane:
                kept = deque(message for message in lane if id(message._item) not in gone)
                if len(kept) != len(lane):
                    dropped.extend(message for message in lane if id(message._item) in gone)
                    self._lanes[key] = kept or None
        return self._uncount(dropped)

    def _uncount(self, messages: Iterable[Message[Any]]) -> list[Message[Any]]:
        gone = list(messages)
        for message in gone:
            self._count(message, -1)
        return gone

    def _count(self, message: Message[Any], by: int) -> None:
        self.parked += by
        self.parked_bytes += by * len(message._item.record.body or b"")
