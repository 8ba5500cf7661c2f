"""Requests of members of share groups, packed by hand: byte for byte what Kafka's schemas say."""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from kio.schema.share_acknowledge.v2 import request as acknowledging
from kio.schema.share_fetch.v2 import request as fetching
from kio.serial import entity_writer

from brokerkit.drivers.kafka._share_ask import Said, ShareAcknowledge, ShareFetch, names

_fetching: Any = fetching
_acknowledging: Any = acknowledging
GROUP, MEMBER = "emails" * 30, "bWVtYmVy"
PARTS: dict[str, list[tuple[int, Sequence[Said]]]] = {
    "nothing": [],
    "a partition": [(3, ())],
    "many partitions": [(index, ()) for index in range(300)],
    "what is said": [(0, [(5, 2**40, b"\1"), (2**40 + 2, 2**40 + 4, b"\1\2\0")]), (7, ()), (9, [(1, 1, b"\4")])],
    "much that is said": [
        (0, [(index * 2, index * 2, b"\1") for index in range(1000)]),
        (1, [(0, 1999, b"\1\2" * 1000)]),
    ],
}


def topics(module: Any, id: uuid.UUID, parts: Sequence[tuple[int, Sequence[Said]]]) -> tuple[Any, ...]:
    if not parts:
        return ()
    of_fetch = module is _fetching
    topic = module.FetchTopic if of_fetch else module.AcknowledgeTopic
    partition = module.FetchPartition if of_fetch else module.AcknowledgePartition
    partitions = tuple(
        partition(
            partition_index=index,
            acknowledgement_batches=tuple(
                module.AcknowledgementBatch(first_offset=first, last_offset=last, acknowledge_types=tuple(types))
                for first, last, types in said
            ),
        )
        for index, said in parts
    )
    return (topic(topic_id=id, partitions=partitions),)


def written(entity: Any) -> bytes:
    buffer = io.BytesIO()
    entity_writer(entity.__class__)(buffer, entity)
    return buffer.getvalue()


@pytest.mark.parametrize("forget", [[], [1, 2, 300]])
@pytest.mark.parametrize("what", PARTS)
def test_requests_for_records_are_what_kafkas_schema_says(what: str, forget: list[int]) -> None:
    id = uuid.uuid4()
    request = ShareFetch(
        names(GROUP, MEMBER), 77, id, iter(PARTS[what]), forget=forget, wait=0.25, size=1234567, records=500
    )
    expected = _fetching.ShareFetchRequest(
        group_id=GROUP,
        member_id=MEMBER,
        share_session_epoch=77,
        max_wait=timedelta(seconds=0.25),
        min_bytes=1,
        max_bytes=1234567,
        max_records=500,
        batch_size=500,
        share_acquire_mode=1,
        is_renew_ack=False,
        topics=topics(_fetching, id, PARTS[what]),
        forgotten_topics_data=(_fetching.ForgottenTopic(topic_id=id, partitions=tuple(forget)),) if forget else (),
    )
    assert request.frame(1).endswith(body := written(expected))
    assert len(request.frame(1)) - len(body) < 30


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("what", PARTS)
def test_acknowledgements_are_what_kafkas_schema_says(what: str, renew: bool) -> None:
    id = uuid.uuid4()
    request = ShareAcknowledge(names(GROUP, MEMBER), -1, id, PARTS[what], renew=renew)
    expected = _acknowledging.ShareAcknowledgeRequest(
        group_id=GROUP,
        member_id=MEMBER,
        share_session_epoch=-1,
        is_renew_ack=renew,
        topics=topics(_acknowledging, id, PARTS[what]),
    )
    assert request.frame(1).endswith(body := written(expected))
    assert len(request.frame(1)) - len(body) < 30
