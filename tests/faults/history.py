"""What processes write down while they work: one line for each thing that happened, which survives kill -9."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias

import msgspec

What: TypeAlias = Literal[
    # producers
    "publish",  # about to
    "confirmed",  # it is stored
    "refused",  # it is certainly not stored
    "unknown",  # it may be
    # consumers
    "ready",  # subscriptions are entered
    "started",  # a handler has the message
    "handled",  # its handler is about to return
    "failed",  # its handler is about to raise
    "acked",  # by hand: the acknowledgement is stored
    "corrupt",  # a message is not what was published
    # all
    "stalled",  # the event loop stood still
    "stopped",  # the process ends by itself
    "problem",  # something is wrong with the program itself
]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One thing that happened."""

    at: float
    """Seconds; all processes of a machine have the same monotonic clock."""
    by: str
    """The process."""
    what: What
    of: str = ""
    """Which queue or topic."""
    id: str = ""
    key: str = ""
    number: int = 0
    """Of published messages: their place among those of the key."""
    failures: int = 0
    """Of published messages: how many runs of a handler are to fail."""
    delay: float = 0.0
    staged: bool = False
    """Of published messages: whether the handler publishes something with its acknowledgement."""
    attempt: int = 0
    deliveries: int = 0
    position: str = ""
    took: float = 0.0
    """How long the event loop stood."""
    text: str = ""


class Journal:
    """Where one process writes: each entry is with the kernel before anything else happens."""

    def __init__(self, path: str | Path, by: str) -> None:
        self._by = by
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._encode = msgspec.json.Encoder().encode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)

    def note(
        self,
        what: What,
        of: str = "",
        id: str = "",
        *,
        key: str = "",
        number: int = 0,
        failures: int = 0,
        delay: float = 0.0,
        staged: bool = False,
        attempt: int = 0,
        deliveries: int = 0,
        position: str = "",
        took: float = 0.0,
        text: str = "",
    ) -> None:
        """Write one entry down."""
        entry = Entry(
            at=now(),
            by=self._by,
            what=what,
            of=of,
            id=id,
            key=key,
            number=number,
            failures=failures,
            delay=delay,
            staged=staged,
            attempt=attempt,
            deliveries=deliveries,
            position=position,
            took=took,
            text=text,
        )
        os.write(self._file, self._encode(entry) + b"\n")


class Reading:
    """The growing journals of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.entries: list[Entry] = []
        """All so far, those of one process in its order."""

    def more(self) -> list[Entry]:
        """Return what was written since the last call."""
        new = [entry for path in sorted(self._folder.glob("*.journal")) for entry in self._more(path)]
        self.entries += new
        return new

    def _more(self, path: Path) -> Iterator[Entry]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        # A process that was killed while it wrote leaves half a line, which says nothing.
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = self._read.get(path, 0) + len(whole)
        for line in whole.splitlines():
            yield _decode(line)


_decode: Final = msgspec.json.Decoder(Entry).decode
now: Final = time.monotonic
