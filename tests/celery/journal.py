"""What workers write down while they work: one line for each thing that happened, which survives kill -9.

`watch` is called by an application, in each of its processes: Celery's own signals say what happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

What: TypeAlias = Literal[
    "ready",  # the worker consumes
    "stopping",  # it was told to end
    "stopped",  # it is about to
    "received",  # it has a task's message
    "began",  # the task runs
    "ended",  # it has, whatever came of it
    "revoked",
    "rejected",
    "unknown",
    "note",  # a task says something
]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One thing that happened."""

    at: float
    """Seconds; all processes of a machine have the same monotonic clock."""
    pid: int
    what: What
    by: str = ""
    """The worker's node name."""
    id: str = ""
    name: str = ""
    state: str = ""
    """Of a task that has ended."""
    retries: int = 0
    again: bool = False
    """Whether the message says that it was delivered before."""
    text: str = ""


class Journal:
    """Where the processes of an application write: each entry is with the kernel before anything else happens."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files: dict[int, int] = {}
        self._encode = msgspec.json.Encoder().encode

    def note(
        self,
        what: What,
        *,
        by: str = "",
        id: str = "",
        name: str = "",
        state: str = "",
        retries: int = 0,
        again: bool = False,
        text: str = "",
    ) -> None:
        """Write one entry down."""
        pid = os.getpid()
        entry = Entry(
            at=now(), pid=pid, what=what, by=by, id=id, name=name, state=state, retries=retries, again=again, text=text
        )
        # A file for each process: what one that is killed leaves half written spoils no other's line.
        if pid not in self._files:
            path = os.path.join(self._folder, f"{pid}.journal")
            self._files[pid] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(self._files[pid], self._encode(entry) + b"\n")


class Reading:
    """The growing journals of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.entries: list[Entry] = []
        """All so far, those of one process in its order."""
        self.of: defaultdict[str, list[Entry]] = defaultdict(list)
        """Those of each task."""

    def more(self) -> list[Entry]:
        """Return what was written since the last call."""
        new = [entry for path in sorted(self._folder.glob("*.journal")) for entry in self._more(path)]
        new.sort(key=lambda entry: entry.at)
        self.entries += new
        for entry in new:
            if entry.id:
                self.of[entry.id].append(entry)
        return new

    def _more(self, path: Path) -> Iterator[Entry]:
        before = self._read.get(path, 0)
        if path.stat().st_size == before:
            return
        with path.open("rb") as file:
            file.seek(before)
            data = file.read()
        # A process that was killed while it wrote leaves half a line, which says nothing.
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path] = before + len(whole)
        for line in whole.splitlines():
            yield _decode(line)


def watch(journal: Journal) -> None:
    """Write down what Celery's signals say, and end with the process that has started this one."""
    signals = import_module("celery.signals")

    def info(request: Any) -> Mapping[str, Any]:
        delivered = request.delivery_info or {}
        return {"by": request.hostname or "", "id": request.id or "", "again": bool(delivered.get("redelivered"))}

    def on_ready(sender: Any, **_: Any) -> None:
        journal.note("ready", by=sender.hostname)

    def on_stopping(sender: Any, how: str, **_: Any) -> None:
        journal.note("stopping", by=str(sender), text=how)

    def on_stopped(sender: Any, **_: Any) -> None:
        journal.note("stopped", by=str(sender))

    def on_received(request: Any, **_: Any) -> None:
        journal.note("received", name=request.name, **info(request))

    def on_begin(task: Any, **_: Any) -> None:
        journal.note("began", name=task.name, retries=task.request.retries or 0, **info(task.request))

    def on_end(task: Any, state: str | None = None, **_: Any) -> None:
        journal.note(
            "ended", name=task.name, state=state or "", retries=task.request.retries or 0, **info(task.request)
        )

    def on_revoked(request: Any, **_: Any) -> None:
        journal.note("revoked", id=request.id or "", by=request.hostname or "")

    def on_rejected(message: Any, **_: Any) -> None:
        journal.note("rejected", id=str((message.headers or {}).get("id") or ""))

    def on_unknown(name: str, id: str, **_: Any) -> None:
        journal.note("unknown", id=id, name=name)

    def on_child(**_: Any) -> None:
        end_with_the_parent()

    for name, heard in {
        "worker_ready": on_ready,
        "worker_shutting_down": on_stopping,
        "worker_shutdown": on_stopped,
        "task_received": on_received,
        "task_prerun": on_begin,
        "task_postrun": on_end,
        "task_revoked": on_revoked,
        "task_rejected": on_rejected,
        "task_unknown": on_unknown,
        "worker_process_init": on_child,
    }.items():
        getattr(signals, name).connect(heard, weak=False)
    end_with_the_parent()


def end_with_the_parent() -> None:
    """Have the kernel kill this process when the one that has started it dies, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


_decode: Final = msgspec.json.Decoder(Entry).decode
now: Final = time.monotonic
