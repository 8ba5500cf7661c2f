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
"""For `Broker.delete`, and to remove what a queue has done: without it a queue grows."""
SHARING: Final[Mapping[Resource, tuple[str, ...]]] = {"group": ("alter_configs",)}
"""To give a share group its queue's lease, and as many deliveries as the cluster admits."""


def rights(prefix: str, *, declare: bool = True, user: str = USER) -> list[Right]:
    """Return the rights on all topics whose names begin with *prefix*, and on their groups.

    Without *declare* everything has to be there: for ``declare="never"``.
    """
    tables = [USING, *([DECLARING, MANAGING, SHARING] if declare else [])]
    return [
        Right(user, resource, prefix, operation, prefixed=True)
        for table in tables
        for resource, operations in table.items()
        for operation in operations
    ]


def commands(prefix: str = "shop.") -> str:
    """Return the commands of README that give all of that, as a shell takes them."""
    head = f"kafka-acls.sh --bootstrap-server localhost:9092 --add --allow-principal User:{USER} --resource-pattern-type prefixed"
    lines = []
    for resource in ("topic", "group"):
        named = [right.operation for right in rights(prefix) if right.resource == resource]
        words = " ".join(f"--operation {name.title().replace('_', '')}" for name in named)
        lines.append(f"{head} \\\n    --{resource} {prefix} {words}")
    return "\n".join(lines)
