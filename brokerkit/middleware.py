"""Functions around handlers: tracing, metrics, timing, transactions.

A middleware takes the message, or the sequence of them for a batch handler, and *call_next*, which runs the next middleware
and at last the handler.  It returns what *call_next* returns, the reply on a queue that replies::

    async def timed(message, call_next):
        begin = time.perf_counter()
        try:
            return await call_next(message)
        finally:
            print(message.id, time.perf_counter() - begin)

What it raises counts as raised by the handler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias

from .message import Message

Handled: TypeAlias = Message[Any] | Sequence[Message[Any]]
"""What a handler is called with."""
CallNext: TypeAlias = Callable[[Any], Awaitable[object]]


class Middleware(Protocol):
    """An ``async def`` function of a message and what comes next."""

    def __call__(self, message: Any, call_next: CallNext, /) -> Awaitable[object]:
        """Run ``await call_next(message)`` once, or raise to fail the attempt."""
        ...


def compose(middleware: Sequence[Middleware], handler: CallNext) -> CallNext:
    """Return *handler* inside *middleware*, the first outermost."""
    for wrapper in reversed(middleware):
        handler = _wrap(wrapper, handler)
    return handler


def _wrap(wrapper: Middleware, inner: CallNext) -> CallNext:
    async def run(message: Any) -> object:
        return await wrapper(message, inner)

    return run
