"""Requests for records, packed by hand: byte for byte what Kafka's schema says."""

from __future__ import annotations

import io
import uuid
from datetime import timedelta
from typing import Any

import pytest
from kio.schema.fetch.v13 import request as requests
from kio.schema.fetch.v13.request import FetchRequest
from kio.serial import entity_writer

from brokerkit.drivers.kafka._ask import Fetch
from brokerkit.drivers.kafka._fetch import ANSWER

from .test_fetch_lanes import request_of


@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 20_000])
def test_requests_are_what_kafkas_schema_says(count: int) -> None:
    topic = uuid.uuid4()
    parts = [(index, index % 5 - 1, 2**40 + index, index % 7 - 1, 1024 + index) for index in range(count)]
    request = Fetch(topic, parts, wait=0.25, most=ANSWER)
    kinds: tuple[Any, ...] = (FetchRequest, requests.FetchTopic, requests.FetchPartition)
    expected = kinds[0](
        max_wait=timedelta(seconds=0.25),
        min_bytes=1,
        max_bytes=ANSWER,
        isolation_level=1,
        topics=(
            kinds[1](
                topic_id=topic,
                partitions=tuple(
                    kinds[2](
                        partition=index,
                        current_leader_epoch=leader,
                        fetch_offset=offset,
                        last_fetched_epoch=epoch,
                        partition_max_bytes=size,
                    )
                    for index, leader, offset, epoch, size in parts
                ),
            ),
        ),
        forgotten_topics_data=(),
    )
    written = io.BytesIO()
    entity_writer(FetchRequest)(written, expected)
    assert request.frame(1).endswith(written.getvalue())
    assert request_of(request) == expected
