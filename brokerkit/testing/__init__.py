"""Tools for tests of services: no server, no sleeps."""

from __future__ import annotations

from ._loop import Deadlock, VirtualLoop, now, run, virtual_loop

__all__ = ["Deadlock", "VirtualLoop", "now", "run", "virtual_loop"]
