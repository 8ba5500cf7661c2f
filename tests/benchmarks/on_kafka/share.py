"""What the cluster itself says of the share group of a queue, asked without brokerkit."""

from __future__ import annotations

import io
import time
from typing import Any, Final

from .server import wire

DESCRIBE: Final = 90
VERSION: Final = 1
PATIENCE: Final = 5.0


def divided(url: str, partitions: int) -> str:
    """Return *url* with the option that makes queues of so many partitions."""
    return f"{url}?queue_partitions={partitions}"


def lag(url: str, queue: str) -> int:
    """Return how many messages of *queue* are not acknowledged."""
    with wire(url) as admin:
        ends, begins = admin.offsets(queue, end=True), admin.offsets(queue, end=False)
        deadline = time.monotonic() + PATIENCE
        while True:
            told = _described(admin, queue)
            # Of a partition of which nothing was acknowledged the broker has no number.
            left = sum(
                told.get(index, -1) if told.get(index, -1) >= 0 else end - begins[index] for index, end in ends.items()
            )
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.05)


def _described(admin: Any, group: str) -> dict[int, int]:
    from kio.schema.describe_share_group_offsets.v1.request import (
        DescribeShareGroupOffsetsRequest,
        DescribeShareGroupOffsetsRequestGroup,
    )
    from kio.schema.describe_share_group_offsets.v1.response import DescribeShareGroupOffsetsResponse
    from kio.schema.types import GroupId
    from kio.serial import entity_reader, entity_writer

    asked = DescribeShareGroupOffsetsRequest(
        groups=(DescribeShareGroupOffsetsRequestGroup(group_id=GroupId(group), topics=None),)
    )
    body = io.BytesIO()
    entity_writer(DescribeShareGroupOffsetsRequest)(body, asked)
    answer = admin.ask(DESCRIBE, VERSION, body.getvalue(), flexible=True)
    told, _ = entity_reader(DescribeShareGroupOffsetsResponse)(answer.data, answer.at)
    found: dict[int, int] = {}
    for one in told.groups:
        if one.error_code.value:
            raise OSError(f"the share group {group}: {one.error_code.name} {one.error_message}")
        for topic in one.topics:
            for partition in topic.partitions:
                if partition.error_code.value:
                    raise OSError(f"{topic.topic_name} {partition.partition_index}: {partition.error_code.name}")
                found[int(partition.partition_index)] = int(partition.lag)
    return found
