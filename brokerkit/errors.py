"""The error tree.  Everything brokerkit raises on purpose is a `BrokerError`.

::

    BrokerError
    ├── ConfigError              the program asks for something that makes no sense
    │   ├── InvalidName          a topic, queue or group name outside the rules
    │   └── InsecureCredentials  a password on a plaintext connection
    ├── CapabilityError          this backend cannot honour that option
    ├── NotFound                 the address, group or letter does not exist
    ├── SettingsMismatch         the address exists with other settings
    ├── TooLarge                 a body, key, header or id over its limit
    ├── EncodeError              a value that its codec cannot write
    ├── DecodeError              bytes that its codec cannot read
    ├── BrokerUnavailable *      no answer; certainly nothing was stored
    ├── PublishUnknown *         no answer; it may have been stored
    ├── NotAttempted *           an earlier record of the same key failed, so this one was not sent
    ├── BufferFull *             no room now
    ├── DeliveryLost             the message belongs to another consumer by now
    ├── AlreadySettled           the message has another outcome already
    ├── PositionLost             the position asked for is gone from the log
    ├── AuthenticationError      the credentials were refused
    ├── AuthorizationError       the credentials do not allow this operation
    ├── RequestTimeout           nobody answered a request in time
    ├── RemoteError              the replier failed
    └── Closed                   used after closing, or before opening

``*`` is `BrokerError.retryable`: trying again can help.  The client library's own error is always the ``__cause__``.
`Reject` and `Nack` steer a message from inside a handler and are no errors of the tree.
"""

from __future__ import annotations

import math
from typing import ClassVar


class BrokerError(Exception):
    """Base of all errors that brokerkit raises."""

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later."""


class ConfigError(BrokerError):
    """The program asks for something that makes no sense; the text says what to change."""


class InvalidName(ConfigError):
    """A topic, queue, group or prefix name breaks the naming rules."""


class InsecureCredentials(ConfigError):
    """A password would travel over a plaintext connection."""


class CapabilityError(BrokerError):
    """This backend cannot honour an option; the text names option, address and backend."""


class NotFound(BrokerError):
    """The address, group or letter does not exist."""


class SettingsMismatch(BrokerError):
    """The address exists with other settings than the program declares."""


class TooLarge(BrokerError):
    """A body, key, id or header is over its limit; nothing was sent."""


class EncodeError(BrokerError):
    """A value cannot be written by its codec; nothing was sent."""


class DecodeError(BrokerError):
    """A body cannot be read by its codec."""


class BrokerUnavailable(BrokerError):
    """The message system did not answer; certainly nothing was stored."""

    retryable = True


class PublishUnknown(BrokerError):
    """The answer to a publish was lost: the message may be stored or not."""

    retryable = True


class NotAttempted(BrokerError):
    """Not sent, because an earlier message of the same key failed and order must hold."""

    retryable = True


class BufferFull(BrokerError):
    """There is no room for the message now."""

    retryable = True


class DeliveryLost(BrokerError):
    """The delivery belongs to another consumer by now; settling it had no effect.

    *published* tells whether the records of the settlement were stored all the same.
    """

    def __init__(
        self, text: str = "the delivery belongs to another consumer by now", *, published: bool = False
    ) -> None:
        super().__init__(text)
        self.published = published


class AlreadySettled(BrokerError):
    """The message has another outcome already; this call had no effect."""


class PositionLost(BrokerError):
    """Records were removed before they could be read; *lost* is how many, if known."""

    def __init__(self, text: str, *, lost: int | None = None) -> None:
        super().__init__(text)
        self.lost = lost


class AuthenticationError(BrokerError):
    """The message system refused the credentials."""


class AuthorizationError(BrokerError):
    """The credentials do not allow the operation; the text names resource and operation."""


class RequestTimeout(BrokerError):
    """Nobody answered a request within its timeout."""


class RemoteError(BrokerError):
    """The replier failed for good.  *error* is the class name of what it raised."""

    def __init__(self, text: str, *, error: str = "") -> None:
        super().__init__(text)
        self.error = error


class Closed(BrokerError):
    """The broker, subscription or service is closed, or not open yet."""


class Reject(Exception):
    """Raise in a handler: dead-letter the message at once, without a retry."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Nack(Exception):
    """Raise in a handler: run the message again after *delay* seconds.  It counts as a failed attempt."""

    def __init__(self, *, delay: float = 0) -> None:
        if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < math.inf:
            raise ValueError(f"Nack(delay={delay!r}): delay is a number of seconds, 0 or more")
        super().__init__(f"again in {delay:g} s")
        self.delay = delay
