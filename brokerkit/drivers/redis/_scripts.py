"""The Lua scripts: assembled from files, sent once to each server, then called by their hash."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Final

_FLAGS = re.compile(r"^-- flags: (.+)$", re.MULTILINE)
_USES = re.compile(r"^-- uses: (.+)$", re.MULTILINE)
_ALL: dict[str, Script] = {}


class Script:
    """One script, by the name of its file in ``lua/``.

    A line ``-- uses: a b`` in the file puts the files a and b before it; ``-- flags: allow-oom`` lets it run on a full server,
    which everything must that does not store more than it removes.
    """

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = _assemble(name)
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()
        _ALL[name] = self

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


def every() -> tuple[Script, ...]:
    """Return all scripts: what is loaded on each new connection."""
    return tuple(_ALL.values())


def _assemble(name: str) -> bytes:
    text = _read(name)
    flags = _FLAGS.search(text)
    head = f"#!lua flags={flags[1]}\n" if flags else "#!lua\n"
    uses = _USES.search(text)
    parts = [_read(part) for part in (uses[1].split() if uses else ())]
    return (head + "\n".join((*parts, text))).encode()


def _read(name: str) -> str:
    return files(__package__ or __name__).joinpath("lua", f"{name}.lua").read_text("utf-8")


PUBLISH: Final = Script("publish")
PUBLISH_QUEUE: Final = Script("publish_queue")
PUBLISH_TOPIC: Final = Script("publish_topic")
QUEUE_JOIN: Final = Script("queue_join")
QUEUE_LEAVE: Final = Script("queue_leave")
QUEUE_OUTCOME: Final = Script("queue_outcome")
QUEUE_PASS: Final = Script("queue_pass")
QUEUE_RECOVER: Final = Script("queue_recover")
QUEUE_RELEASE: Final = Script("queue_release")
QUEUE_RENEW: Final = Script("queue_renew")
QUEUE_SETTLE: Final = Script("queue_settle")
QUEUE_TAKE: Final = Script("queue_take")
TOPIC_START: Final = Script("topic_start")
TOPIC_SYNC: Final = Script("topic_sync")
TOPIC_READ: Final = Script("topic_read")
TOPIC_NOTE: Final = Script("topic_note")
TOPIC_SETTLE: Final = Script("topic_settle")
TOPIC_SEEK: Final = Script("topic_seek")
TOPIC_LOOK: Final = Script("topic_look")
