"""Records as bytes: what is written is read again, and what is damaged never passes for something else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brokerkit.address import Queue, Topic
from brokerkit.driver import Record
from brokerkit.drivers.redis._frames import BROKEN, element, frame, queue_blob, read, topic_blob
from brokerkit.drivers.redis._keys import entity

QUEUE = Queue("emails", bytes, priorities=9)
TOPIC = Topic("orders", bytes)
PLAIN = (("bk-content-type", b"application/json"),)

ids = st.one_of(
    st.text(min_size=1, max_size=200).filter(str.isprintable),
    st.from_regex(r"[0-9a-f]{20}-[0-9]{1,12}", fullmatch=True),
)
headers = st.one_of(
    st.just(()),
    st.just(PLAIN),
    st.lists(st.tuples(st.text(min_size=1, max_size=20), st.binary(max_size=40)), max_size=6).map(tuple),
    st.lists(st.tuples(st.text(min_size=1, max_size=20), st.binary(max_size=40)), max_size=6).map(
        lambda more: (*PLAIN, *more)
    ),
)
times = st.floats(allow_nan=False, allow_infinity=False)


@given(ids, st.one_of(st.none(), st.binary(max_size=200)), headers, times, st.integers(0, 65535), st.integers(0, 8))
def test_what_a_queue_stores_is_read_as_it_was(
    id: str, body: bytes | None, headers: tuple[tuple[str, bytes], ...], when: float, attempts: int, priority: int
) -> None:
    record = Record(QUEUE, id, body, None, headers, when, attempts=attempts, priority=priority)
    assert element(QUEUE, queue_blob(record)) == (0, 0, record)


@given(ids, st.binary(max_size=1024), st.binary(max_size=50), headers, st.integers(0, 255))
def test_what_a_topic_stores_is_read_as_it_was(
    id: str, key: bytes, body: bytes, headers: tuple[tuple[str, bytes], ...], deliveries: int
) -> None:
    record = Record(TOPIC, id, body, key, headers, 1.5, deliveries=deliveries)
    assert read(TOPIC, topic_blob(record, 0), 4) == record


@given(st.integers(0, 120), headers)
def test_a_frame_that_was_cut_is_broken_or_a_shorter_body(size: int, headers: tuple[tuple[str, bytes], ...]) -> None:
    whole = frame(Record(TOPIC, "0123456789abcdef0123-7", b"body", b"key", headers, 1.5))
    got = read(TOPIC, whole[:size], number=9)
    if got.id != "0123456789abcdef0123-7":
        assert (got.id, got.body, got.headers) == ("broken-9", whole[:size], (("bk-content-type", BROKEN),))
    else:
        assert got.key == b"key"
        assert got.headers == headers


@given(st.binary(max_size=80))
def test_foreign_bytes_never_raise(data: bytes) -> None:
    read(TOPIC, data)
    element(QUEUE, data)


def test_a_generated_id_is_short() -> None:
    record = Record(QUEUE, "0123456789abcdef0123-1234567", b"x" * 100, None, PLAIN, 1.5)
    assert len(queue_blob(record)) <= 100 + 45


def test_equal_headers_are_one_object_when_they_are_read() -> None:
    blob = queue_blob(Record(QUEUE, "a", b"", None, PLAIN, 1.5))
    assert element(QUEUE, blob)[2].headers is element(QUEUE, blob)[2].headers


def test_an_expiry_is_kept_to_the_millisecond_and_never_early() -> None:
    record = Record(QUEUE, "a", b"", expires=1234567890.1234)
    expires = element(QUEUE, queue_blob(record))[2].expires
    assert expires is not None
    assert 1234567890.1234 <= expires < 1234567890.1244 + 1e-6


def test_all_keys_of_an_entity_share_a_slot() -> None:
    assert entity("emails") == b"bk:{emails}"
    assert entity("emails..dead") == b"bk:{emails}..dead"
    assert entity("orders..billing..again") == b"bk:{orders}..billing..again"
