"""The request that is written by hand is what Kafka's schema says."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from kio.schema.errors import ErrorCode
from kio.schema.produce.v9 import request, response

from brokerkit.drivers.kafka._api import Request
from brokerkit.drivers.kafka._produce import Produce

from .liar import frame

_request: Any = request
_response: Any = response


@pytest.mark.parametrize(
    "topics",
    [
        {},
        {"orders": [(0, b"data")]},
        {"orders": [(0, b""), (70_000, b"x" * 300)], "ü" * 100: [(1, b"y" * 126), (2, b"y" * 127), (3, b"z" * 128)]},
        {f"t{n}": [(p, b"%d" % p * 9000) for p in range(200)] for n in range(3)},
    ],
)
def test_a_request_is_written_as_its_schema_writes_it(topics: dict[str, list[tuple[int, bytes]]]) -> None:
    whole = _request.ProduceRequest(
        acks=-1,
        timeout=dt.timedelta(seconds=2.5),
        topic_data=tuple(
            _request.TopicProduceData(
                name=name,
                partition_data=tuple(_request.PartitionProduceData(index=index, records=data) for index, data in parts),
            )
            for name, parts in topics.items()
        ),
    )
    assert Produce(topics, 2.5).frame(17) == Request(whole).frame(17)
    assert Produce(topics, 2.5).name == Request(whole).name


def test_an_answer_is_read() -> None:
    part = _response.PartitionProduceResponse(
        index=3,
        error_code=ErrorCode.invalid_record,
        base_offset=-1,
        record_errors=(_response.BatchIndexAndErrorMessage(batch_index=2, batch_index_error_message="bad"),),
        error_message="some are bad",
    )
    topics = (_response.TopicProduceResponse(name="orders", partition_responses=(part,)),)
    whole = _response.ProduceResponse(responses=topics, throttle_time=dt.timedelta(0))
    assert Produce({}, 1).read(frame(17, whole)) == whole
