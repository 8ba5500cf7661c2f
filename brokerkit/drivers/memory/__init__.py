"""The memory driver: real topics and queues in this process, for embedding and for tests.

A server holds what is stored and who owns it; a driver is one connection to it.  ``memory://`` makes a server of its own,
``memory://name`` shares one with every connection of that name in this process, and keeps it when the last one closes.

Options: *max_messages*, what an address holds at most (100,000); *session*, the seconds that a topic's member survives
without a sign of life (10).
"""

from ._driver import MemoryDriver as MemoryDriver
from ._faults import Faults as Faults

__all__ = ["Faults", "MemoryDriver"]
