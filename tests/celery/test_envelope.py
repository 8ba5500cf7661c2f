"""Messages of Kombu as bytes, and back."""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps

from brokerkit.celery._envelope import Envelope, check_task, due, level, pack, redelivered, seal, unseal, wait
from brokerkit.errors import DecodeError, EncodeError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def message(body: Any = "[[], {}, {}]", **options: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {"delivery_info": {}},
    }
    return {**made, **options}


def frame(*, headers: dict[str, Any] | None = None, **properties: Any) -> Any:
    made = message(headers=headers or {}, properties={"delivery_info": {}, **properties})
    return seal(made, "", "direct", "celery")


@given(
    st.text() | st.binary(),
    st.sampled_from(["utf-8", "UTF-8", "us-ascii", "binary", None]),
    st.dictionaries(st.text(), JSON),
)
def test_what_is_packed_comes_back(body: str | bytes, encoding: str | None, headers: dict[str, Any]) -> None:
    back = unseal(pack(message(body, **{"content-encoding": encoding, "headers": headers})))
    got = back.pop("body")
    assert (got.encode("utf-8", "surrogatepass") if isinstance(got, str) and isinstance(body, bytes) else got) == body
    wanted = message(**{"content-encoding": encoding, "headers": headers})
    del wanted["body"]
    assert back == wanted


def test_text_is_stored_as_it_is_and_other_bytes_in_base64() -> None:
    text = orjson.loads(pack(message(b'"caf\xc3\xa9"')))
    assert (text["body"], "body_encoding" in text["properties"]) == ('"caf\xe9"', False)
    other = orjson.loads(pack(message(b"\x80\x05", **{"content-encoding": "binary"})))
    assert (other["body"], other["properties"]["body_encoding"]) == ("gAU=", "base64")


def test_a_compressed_body_stays_bytes_whatever_they_are() -> None:
    assert unseal(pack(message(b"abc", headers={"compression": "x"})))["body"] == b"abc"


def test_the_message_that_was_given_is_not_changed() -> None:
    given_message = message(b"\x00\xff", **{"content-encoding": "binary"})
    pack(given_message)
    assert "body_encoding" not in given_message["properties"]


def test_what_kombu_has_types_for_arrives_in_them() -> None:
    headers = {"when": datetime(2026, 1, 2, tzinfo=UTC), "price": Decimal("1.50"), "raw": b"\xff", "n": 2**80}
    assert unseal(pack(message(headers=headers)))["headers"] == headers


def test_what_kombu_stores_itself_can_be_read() -> None:
    stored = message(
        "W10=", properties={"delivery_info": {}, "body_encoding": "base64"}, headers={"id": uuid.UUID(int=5)}
    )
    back = unseal(dumps(stored).encode())
    assert (back["body"], back["headers"]["id"]) == (b"[]", uuid.UUID(int=5))


def test_an_envelope_of_a_service_is_what_kombu_reads() -> None:
    import msgspec

    body = msgspec.json.encode(Envelope(body="[]", headers={"task": "add"}))
    back = unseal(body)
    assert back["content-type"] == "application/json"
    assert (back["body"], back["headers"], back["properties"]) == ("[]", {"task": "add"}, {"delivery_info": {}})


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"[]", b"{}", b'{"body": "x"}', b'{"body": "x", "properties": []}',
     b'{"body": "x", "properties": {}, "headers": 5}',
     b'{"body": "\xc3", "properties": {}}',
     b'{"body": "?", "properties": {"body_encoding": "base64"}}',
     b'{"body": 5, "properties": {"body_encoding": "base64"}}',
     b'{"body": "x", "properties": {"a": {"__type__": "nobody", "__value__": 1}}}'],
)  # fmt: skip
def test_what_is_no_message_of_kombu_cannot_be_read(body: bytes) -> None:
    with pytest.raises(DecodeError):
        unseal(body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"body": 5}, {"body": None}, {"body": True}, {"content-type": 5}, {"content-type": ["a"]},
        {"content-encoding": 7}, {"content-encoding": {}},
    ],
)  # fmt: skip
def test_what_ends_who_reads_it_is_no_message_of_kombu(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"body": "", "content-type": None, "content-encoding": None, "properties": {}}
    assert unseal(json.dumps(right).encode())["body"] == ""
    with pytest.raises(DecodeError, match="no message of Celery"):
        unseal(json.dumps({**right, **wrong}).encode())


TASK = {"task": "add", "id": "1", "timelimit": [None, 1.5], "stamps": {"a": ["b"]}, "stamped_headers": ["a"]}


@pytest.mark.parametrize(
    "right", [{}, {"id": 5}, {"timelimit": None}, {"timelimit": []}, {"stamps": None}, {"stamped_headers": None}]
)
def test_headers_of_a_task(right: dict[str, Any]) -> None:
    check_task({**TASK, **right})


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": ["x"]}, {"task": {}}, {"task": None}, {"id": None}, {"id": ["a"]}, {"id": ""}, {"timelimit": "x"},
        {"timelimit": [1]}, {"timelimit": ["a", "b"]}, {"timelimit": {"a": 1}}, {"stamps": 5}, {"stamped_headers": 7},
    ],
)  # fmt: skip
def test_headers_over_which_a_worker_ends_are_those_of_no_task(wrong: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="no task of Celery"):
        check_task({**TASK, **wrong})


def test_what_is_no_json_is_refused_before_it_is_sent() -> None:
    with pytest.raises(EncodeError):
        frame(headers={"a": object()})


def test_the_mark_of_a_message_that_comes_again() -> None:
    payload = unseal(pack(message(properties={})))
    redelivered(payload)
    assert payload["properties"]["delivery_info"] == {"redelivered": True}


def test_when_a_task_is_due() -> None:
    at = datetime(2026, 3, 4, 5, 6, 7, 250_000, tzinfo=timezone(timedelta(hours=2)))
    assert due(at.isoformat()) == due(at) == at.timestamp()
    assert due("2026-03-04T03:06:07.250000") == at.timestamp()
    assert due("2026-03-04T03:06:07.25Z") == at.timestamp()
    for bad in ("soon", "", None, 5, "9999-99-99"):
        assert due(bad) is None


def test_how_long_the_broker_keeps_a_task() -> None:
    now = time.time()
    assert wait(None, 60) == wait(now + 59, 60) == wait(now - 5, 60) == 0
    assert 39 < wait(now + 100, 60) <= 40


def test_a_task_is_never_dropped_for_its_age() -> None:
    assert frame(expiration="1500").ttl == 1.5
    assert frame(headers={"task": "add"}, expiration="1500").ttl is None
    assert frame(expiration="soon").ttl is None
    assert frame(headers={"task": "add"}).task
    assert not frame().task


def test_priorities_are_those_of_amqp() -> None:
    assert [level(n) for n in (None, 0, 4, 9, 12, -1, "3", "x")] == [0, 0, 4, 9, 9, 0, 3, 0]
    assert frame(priority=12).priority == 9
    assert frame(priority=None).priority == 0
