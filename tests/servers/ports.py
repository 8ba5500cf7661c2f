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
    """Return a port of 127.0.0.1 that nobody has, whether listening or not."""
    while True:
        port = _random.choice(_PORTS)
        with socket.socket() as probe:  # without SO_REUSEADDR, which would overlook who only keeps a port
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def kept(port: int) -> socket.socket:
    """Return a socket that has *port* and does not listen yet: who connects is refused, and nobody else gets the port."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        keeper.bind(("127.0.0.1", port))
    except BaseException:
        keeper.close()
        raise
    keeper.setblocking(False)
    return keeper
