"""What the parts of one driver share."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ...errors import BrokerError
from ...events import Listener
from ._cluster import Cluster
from ._options import Settings
from ._publish import Outboxes
from ._time import ServerTime


class Reader(Protocol):
    """A consumer that is entered."""

    @property
    def problem(self) -> BrokerError | None:
        """Why nothing comes out of it, if nothing does."""
        ...


class Context(msgspec.Struct, eq=False):
    """One driver, as its consumers see it."""

    cluster: Cluster
    outboxes: Outboxes
    settings: Settings
    emit: Listener
    time: ServerTime
    readers: dict[Reader, None]
    """All consumers that are entered."""
