"""Publishers that misbehave, for the tests of the harness."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .client import Client, Publisher


class Altering(Client):
    """Publishes something else than it was asked to."""

    def altered(self, item: Any) -> Sequence[Any]:
        """Return what is published for *item*."""
        return [item]

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        async with super().publisher() as to:

            async def one(item: Any) -> None:
                for some in self.altered(item):
                    await to.one(some)

            async def many(items: Sequence[Any]) -> None:
                await to.many([some for item in items for some in self.altered(item)])

            yield Publisher(one, many)


class Loses(Altering):
    """Never publishes number 7."""

    def altered(self, item: Any) -> Sequence[Any]:
        return [] if number(item) == 7 else [item]


class Doubles(Altering):
    """Publishes number 7 twice."""

    def altered(self, item: Any) -> Sequence[Any]:
        return [item, item] if number(item) == 7 else [item]


class Keeps(Altering):
    """Publishes number 8 in place of number 7: the count alone is right."""

    before: Any = None

    def altered(self, item: Any) -> Sequence[Any]:
        if number(item) == 7:
            return []
        return [item, item] if number(item) == 8 else [item]


def number(item: Any) -> int:
    """Return the number of what a publisher is given."""
    value = item[0] if isinstance(item, tuple) else item
    return int(value["n"] if isinstance(value, dict) else value.n)
