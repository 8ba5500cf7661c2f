"""How publishing from an event loop blocks nothing: Celery's own code runs to its end, and its frames are sent afterwards.

While `frames` has a list, in one call without any ``await`` in it, a channel appends what it would publish, and whatever
would wait for the bridge raises `WouldBlock`: then nothing was sent, and the same call is made again in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol


class Loop(Protocol):
    """What is asked of a bridge."""

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have *function* called on the bridge's loop."""


class Frame(NamedTuple):
    """A message that is to be published: ``await function(*args)``, on the bridge's loop."""

    bridge: Loop
    function: Callable[..., Coroutine[Any, Any, object]]
    args: tuple[Any, ...]


class WouldBlock(BaseException):
    """Something that is not prepared yet has to wait for the broker.

    No `Exception`, so that nothing on the way takes it for an error of the connection.
    """


frames: ContextVar[list[Frame] | None] = ContextVar("brokerkit frames of Celery", default=None)
