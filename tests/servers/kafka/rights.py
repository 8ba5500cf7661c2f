"""The least that a program with brokerkit needs to be allowed on a Kafka cluster: the conformance suite runs with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..access import USER
from .wire import Resource, Right

USING: Final[Mapping[Resource, tuple[str, ...]]] = {"topic": ("read", "write"), "group": ("read",)}
"""To publish, to subscribe, to browse and to redrive, where all topics exist; DESCRIBE comes with any of them."""
DECLARING: Final[Mapping[Resource, tuple[str, ...]]] = {"topic": ("create", "describe_configs")}
"""To create what is missing, and to compare what there is: ``declare="auto"`` and ``"check"``, and dead letters of topics."""
MANAGING: Final[Mapping[Resource, tuple[str, ...]]] = {"topic": ("delete",), "group": ("delete",)}
"""For `Broker.delete`."""


def rights(
    prefix: str, *, declare: bool = True, manage: bool = True, user: str = USER, groups: str | None = None
) -> list[Right]:
    """Return the rights on all topics whose names begin with *prefix*, and on their groups."""
    tables = [USING, *([DECLARING] if declare else []), *([MANAGING] if manage else [])]
    return [
        Right(user, resource, prefix if resource == "topic" or groups is None else groups, operation, prefixed=True)
        for table in tables
        for resource, operations in table.items()
        for operation in operations
    ]
