"""Telling once that something in the background does not work."""

from __future__ import annotations

import logging

from ...errors import BrokerError
from ...events import Listener, UpkeepFailed

logger = logging.getLogger("brokerkit")


class Teller:
    """Tells of one task that serves a queue."""

    def __init__(self, emit: Listener, address: str, task: str) -> None:
        self._emit = emit
        self._address = address
        self._task = task
        self.problem: BrokerError | None = None
        """Why it does not work, if it does not."""

    def failed(self, error: BrokerError) -> None:
        """Take note that it does not work; the first time it is told."""
        known, self.problem = self.problem, error
        if known is None:
            logger.warning("%s: %s does not work, and is tried again: %s", self._address, self._task, error)
            self._emit(UpkeepFailed(address=self._address, task=self._task, error=str(error)))

    def works(self) -> None:
        """Take note that it works."""
        if self.problem is not None:
            self.problem = None
            logger.info("%s: %s works again", self._address, self._task)
