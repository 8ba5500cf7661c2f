"""The names of keys and channels.

All keys of an entity carry one hash tag, the part of its name before the first ``..``: so a queue and its dead letters, a
topic and all its groups are in one slot of a cluster, and one script reaches them.
"""

from __future__ import annotations

import functools
from typing import Final

ROOT: Final = b"bk:"
"""Every key and channel begins with this."""


@functools.lru_cache(maxsize=4096)
def entity(name: str) -> bytes:
    """Return the key of the settings of *name*; all its other keys begin with it and a colon."""
    base, dots, rest = name.partition("..")
    return f"bk:{{{base}}}{dots}{rest}".encode()
