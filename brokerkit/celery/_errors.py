"""Which errors Celery answers by connecting again."""

from __future__ import annotations

from typing import Final

from ..errors import (
    AuthorizationError,
    BrokerUnavailable,
    BufferFull,
    CapabilityError,
    Closed,
    NotFound,
    PublishUnknown,
    SettingsMismatch,
)

CONNECTION_ERRORS: Final[tuple[type[Exception], ...]] = (
    BrokerUnavailable,
    PublishUnknown,  # sent again: Celery's publishing is at least once
    BufferFull,
    Closed,
    OSError,
)
"""What the producer tries again and the worker connects again for.

Not here: refused credentials, a wrong address, a message that is too large.  Trying those again would change nothing, so they
come out at once, under their own names.
"""

CHANNEL_ERRORS: Final[tuple[type[Exception], ...]] = (AuthorizationError, CapabilityError, NotFound, SettingsMismatch)
"""What concerns one queue or exchange, and no connection."""
