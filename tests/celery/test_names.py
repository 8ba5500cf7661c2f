"""Each name of Celery is one name in the broker."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brokerkit.address import MAX_NAME, check_name
from brokerkit.celery._names import LONGEST, Names, encode, service_queue
from brokerkit.errors import ConfigError

CLOSE = st.text(alphabet="ab_.-25def@é", max_size=12)
"""Names that differ in what is escaped, and in what looks like an escape."""
ANY = st.text(st.characters(codec=None), max_size=200)


def as_kafka_sees(name: str) -> str:
    """Kafka refuses a topic whose name is another one's but for dots and underscores."""
    return name.replace(".", "_")


@given(CLOSE | ANY, CLOSE | ANY)
@example("a.b", "a_b")
@example("a.b", "a_2eb")
@example("a_2eb", "a_5f2eb")
@example("-" * 100, "-" * 101)
@example("x" * 100, "x" * 49 + "_2d")
@example("\ud800", "?")
def test_two_names_are_never_one(one: str, other: str) -> None:
    assert (as_kafka_sees(encode(one)) == as_kafka_sees(encode(other))) == (one == other)


@given(CLOSE | ANY)
def test_every_name_is_allowed(name: str) -> None:
    assert len(encode(name)) <= LONGEST
    assert len(check_name("celery." + encode(name) if name else "celery")) <= MAX_NAME


@given(CLOSE)
def test_a_name_can_be_read_back_by_eye(name: str) -> None:
    text, out, at = encode(name), bytearray(), 0
    while at < len(text):
        digits = text[at + 1 : at + 3]
        if text[at] == "_" and len(digits) == 2 and set(digits) <= set("0123456789abcdef"):
            out.append(int(digits, 16))
            at += 3
        else:
            out += text[at].encode()
            at += 1
    assert out.decode() == name


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("celery", "celery"),
        ("my_queue-2", "my_queue-2"),
        ("w1@host.lan", "w1_40host_2elan"),
        ("_2e", "_5f2e"),
        ("", ""),
    ],
)
def test_what_names_look_like(name: str, written: str) -> None:
    assert encode(name) == written


def test_a_long_name_begins_as_it_did() -> None:
    assert encode("tasks-" * 40).startswith("tasks-tasks-")


def test_one_name_is_one_address() -> None:
    names = Names(priorities=10, lease=15)
    assert names.queue("celery") is names.queue("celery")
    assert names.exchange("celery") is names.exchange("celery")
    assert names.exchange("") is not names.exchange("exchange")
    assert names.exchange("").name != names.exchange("exchange").name
    assert service_queue("celery") == names.queue("celery")


def test_an_empty_name_of_a_queue_is_refused() -> None:
    with pytest.raises(ConfigError):
        Names(priorities=1, lease=15).queue("")
