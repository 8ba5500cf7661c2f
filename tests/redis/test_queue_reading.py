"""Reading many elements of a queue at once is the same as reading each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brokerkit.address import Queue
from brokerkit.driver import Record
from brokerkit.drivers.redis._frames import CONTENT_TYPE, element, elements, queue_blob

QUEUE = Queue("queue", bytes)
IDS = st.sampled_from(("0123456789abcdef0123-1", "0123456789abcdef0123-4294967295", "ffff456789abcdef0123-77", "own"))
HEADERS = st.sampled_from(
    (
        ((CONTENT_TYPE, b"application/json"),),
        ((CONTENT_TYPE, b"text/plain"),),
        ((CONTENT_TYPE, b"mine"),),
        ((CONTENT_TYPE, b"application/json"), ("a", b"b")),
        (),
    )
)
RECORDS = st.builds(
    Record,
    st.just(QUEUE),
    IDS,
    st.binary(max_size=30),
    headers=HEADERS,
    timestamp=st.just(1.5),
    expires=st.sampled_from((None, 5.0, 1e9)),
    priority=st.integers(0, 3),
    attempts=st.integers(0, 70000),
    deliveries=st.integers(0, 5),
)


@given(st.lists(RECORDS, max_size=5))
def test_elements_are_read_as_each_is(records: list[Record]) -> None:
    stored = [(number + 2**40).to_bytes(6, "big") + queue_blob(record)[6:] for number, record in enumerate(records)]
    assert elements(QUEUE, stored) == [element(QUEUE, data) for data in stored]
    assert elements(QUEUE, stored) == [element(QUEUE, data) for data in stored], "the second time ids are known"


@given(st.lists(st.binary(max_size=60), max_size=3), st.integers(0, 60), RECORDS)
def test_damaged_elements_are_too(foreign: list[bytes], size: int, record: Record) -> None:
    stored = [*foreign, bytes(6) + queue_blob(record)[6:size]]
    assert elements(QUEUE, stored) == [element(QUEUE, data) for data in stored]
