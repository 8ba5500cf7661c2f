"""A plugin of pytest for Kombu's test_kafka.py: its Kafka is where it always is, and ours is on a free port."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import pytest

PORT: Final = "BROKERKIT_SUITE_KAFKA_PORT"
PREFIX: Final = "BROKERKIT_SUITE_KAFKA_PREFIX"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the functions that make the module's connections use our port, and names of this run; the tests stay as they are."""
    modules = {item.getparent(pytest.Module) for item in items}
    for module in modules:
        assert module is not None
        for name in ("get_connection", "get_failover_connection"):
            real: Callable[..., Any] = getattr(module.obj, name)
            setattr(module.obj, name, partial(_to_ours, real))


def _to_ours(real: Callable[..., Any], hostname: str, port: str) -> Any:
    assert (hostname, port) == ("localhost", "9092")
    connection = real("127.0.0.1", os.environ[PORT])
    connection.transport_options["prefix"] = os.environ[PREFIX]
    return connection
