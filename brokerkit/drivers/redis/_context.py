"""What the parts of one driver share."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ...errors import BrokerError
from ...events import Listener
from ._link import Link
from ._options import Settings
from ._wake import Wakes


class Reader(Protocol):
    """A consumer that is entered."""

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes out of it, if nothing does."""
        ...


class Context(msgspec.Struct, eq=False):
    """One driver, as its consumers see it."""

    link: Link
    sealed: Link
    """Where calls go whose effect must be on disk when they are answered; the same one unless ``durability="aof"``."""
    wakes: Wakes
    process: bytes
    """Random; names this driver to the scripts."""
    settings: Settings
    emit: Listener
    readers: dict[Reader, None]
    """Consumers that are entered; each adds and removes itself."""
