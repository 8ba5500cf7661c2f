"""What an attempt's end becomes: retry copies, dead letters and replies, field by field."""

from __future__ import annotations

import pytest

from brokerkit._outcome import Again, Die, dead_letter, failure_reply, first_failure, judge, reply_to, retry_copy
from brokerkit.address import Queue, Topic, reply_topic
from brokerkit.driver import Record
from brokerkit.errors import Nack, Reject
from brokerkit.policy import RetryPolicy

EMAILS = Queue("emails", str, priorities=3)
RECORD = Record(
    EMAILS,
    "id",
    b"body",
    headers=(("bk-content-type", b"text"), ("user", b"header")),
    timestamp=1000.0,
    delay=3.0,
    ttl=60.0,
    expires=1060.0,
    priority=2,
    attempts=1,
    deliveries=4,
)


def test_a_retry_keeps_everything_but_its_delay_and_counts() -> None:
    copy = retry_copy(RECORD, failures=2, wait=7.0, first_failed=1001.5)
    assert copy == Record(
        EMAILS,
        "id",
        b"body",
        headers=(*RECORD.headers, ("bk-first-failed", b"1001.500000")),
        timestamp=1000.0,
        delay=7.0,
        expires=1060.0,
        priority=2,
        attempts=2,
    )
    assert first_failure(copy) == 1001.5


def test_the_first_failure_stays_the_first() -> None:
    once = retry_copy(RECORD, failures=2, wait=0.0, first_failed=1001.5)
    assert first_failure(retry_copy(once, failures=3, wait=0.0, first_failed=1009.0)) == 1001.5


def test_a_dead_letter_keeps_what_was_published_and_has_no_end() -> None:
    again = retry_copy(RECORD, failures=2, wait=0.0, first_failed=1001.5)
    letter = dead_letter(
        again, EMAILS.dead_letters, Die("why", "KeyError", "text"), failures=3, first_failed=1001.5, now=1010.0
    )
    assert letter.address == EMAILS.dead_letters
    assert (letter.id, letter.body, letter.timestamp, letter.priority) == ("id", b"body", 1000.0, 2)
    assert (letter.delay, letter.ttl, letter.expires) == (0.0, None, None)
    assert (letter.attempts, letter.deliveries) == (3, 0)
    assert letter.headers[:2] == RECORD.headers
    assert dict(letter.headers[2:]) == {
        "bk-dead-reason": b"why",
        "bk-dead-error": b"KeyError",
        "bk-dead-text": b"text",
        "bk-dead-attempts": b"3",
        "bk-dead-first": b"1001.500000",
        "bk-dead-last": b"1010.000000",
        "bk-dead-origin": b"emails",
    }


def test_a_letter_of_a_topic_names_its_group() -> None:
    orders = Topic("orders", str)
    letter = dead_letter(
        Record(orders, "id", b"body", key=b"k"),
        orders.dead_letters("billing"),
        Die("why", "KeyError"),
        failures=1,
        first_failed=1.0,
        now=2.0,
    )
    assert letter.key == b"k"
    assert dict(letter.headers)["bk-dead-group"] == b"billing"


@pytest.mark.parametrize(
    "error, failures, expected",
    [
        (ValueError("bad"), 2, Again),
        (ValueError("bad"), 3, Die),
        (KeyError("other"), 1, Die),
        (Nack(delay=5), 2, Again),
        (Nack(delay=5), 3, Die),
        (Reject("no"), 1, Die),
    ],
)
def test_an_attempt_is_judged_by_error_and_count(error: Exception, failures: int, expected: type) -> None:
    policy = RetryPolicy(attempts=3, on=ValueError)
    assert isinstance(judge(error, policy, failures, in_place=False), expected)


def test_who_nacks_says_when() -> None:
    assert judge(Nack(delay=5), RetryPolicy(wait_initial=100), 1, in_place=False) == Again(5, "Nack")


def test_a_topic_waits_a_minute_at_most() -> None:
    verdict = judge(Nack(delay=61), RetryPolicy(wait_initial=0), 1, in_place=True)
    assert verdict == Again(0.0, "ValueError")


@pytest.mark.parametrize("size, believed", [(0, False), (1, True), (64, True), (65, False)])
def test_only_small_tokens_are_believed(size: int, believed: bool) -> None:
    request = Record(EMAILS, "id", b"body", headers=(("bk-inbox", b"t" * size), ("bk-correlation", b"1")))
    assert (reply_to(request) is not None) == believed


def test_a_failure_is_answered_to_the_token_it_came_with() -> None:
    answer = failure_reply(reply_topic(), (b"token", b"7"), "id", Die("why", "KeyError", "text"), 5.0)
    assert (answer.address, answer.key) == (reply_topic(), b"token")
    assert dict(answer.headers) == {"bk-correlation": b"7", "bk-error": b"KeyError", "bk-error-text": b"text"}
