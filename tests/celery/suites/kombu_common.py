"""Kombu's own tests of any transport, for one of brokerkit's: the environment says which.

`run` starts pytest with this file, where Kombu's tests can be imported from; it is not part of any other run.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

kombu: Any = importlib.import_module("kombu")
common: Any = importlib.import_module("t.integration.common")

URL = os.environ["BROKERKIT_SUITE_URL"]
NOBODY = os.environ["BROKERKIT_SUITE_NOBODY"]
"""Nothing answers there."""
FAILOVER = os.environ["BROKERKIT_SUITE_FAILOVER"]
"""Two URLs: nothing answers at the first."""


@pytest.fixture
def connection() -> Any:
    return kombu.Connection(URL)


@pytest.fixture
def invalid_connection() -> Any:
    return kombu.Connection(NOBODY)


@pytest.fixture
def failover_connection() -> Any:
    return kombu.Connection(FAILOVER, connect_timeout=10)


test_basic = common.BasicFunctionality
test_exchanges = common.BaseExchangeTypes
test_time_to_live = common.BaseTimeToLive
test_priority = common.BasePriority
test_message = common.BaseMessage
test_event_loop = common.BaseEventLoop
test_failover = common.BaseFailover
