"""The schemas of requests: which they are, and when they are imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from kio.index import load_payload_module
from kio.static.constants import EntityType

from brokerkit.drivers.kafka._api import LOG_IN, OFFERED, SPOKEN, schema

REQUESTS = [(key, *one) for table in (SPOKEN, OFFERED, LOG_IN) for key, one in table.items()]
PUBLISHING = {"errors", "init_producer_id", "metadata", "produce", "request_header", "response_header", "types"}
"""What a child of a pool needs to publish: it shares this with its parent."""


@pytest.mark.parametrize(("key", "name", "version"), REQUESTS, ids=lambda value: str(value))
def test_a_name_stands_for_the_version_that_is_spoken(key: int, name: str, version: int) -> None:
    for kind in (EntityType.request, EntityType.response):
        module: Any = load_payload_module(key, version, kind)
        entity = f"{name}{kind.name.capitalize()}"
        assert getattr(schema(name, kind.name), entity) is getattr(module, entity)


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="Fetches"):
        schema("Fetches")
    with pytest.raises(AttributeError, match="FetchesRequest"):
        _ = schema("Fetch").FetchesRequest


def test_a_process_that_has_read_nothing_has_loaded_only_what_publishing_takes() -> None:
    program = "import brokerkit.drivers.kafka, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()
    parts = [name.split(".") for name in loaded]
    assert {part[2] for part in parts if part[:2] == ["kio", "schema"] and len(part) > 2} == PUBLISHING
