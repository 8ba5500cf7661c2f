"""Ports that stay with whoever has them, also while nobody listens there."""

from __future__ import annotations

import random
import socket
from typing import Final

_PORTS: Final = range(10_240, 32_768)
"""Below those that the system gives to outgoing connections: none of them takes the port of a server that restarts."""
_random = random.SystemRandom()
"""Not the generator that tests seed: all processes of a run would choose the same ports."""


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens now."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = _random.choice(_PORTS)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
