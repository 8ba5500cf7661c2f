"""From the end of an attempt to what is stored: retry copies, dead letters, replies.

Pure functions; whoever holds the delivery carries their result out.  All copies keep id, body, key, the user's headers and the
time of first publication.
"""

from __future__ import annotations

from typing import Final

import msgspec

from ._redact import error_text, redact
from .address import AnyDeadLetters, AnyTopic
from .driver import DEAD, Record
from .errors import Nack, Reject
from .message import CONTENT_TYPE, FIRST_FAILED
from .policy import MAX_DELAY, MAX_REASON, QUEUE_WAIT, TOPIC_WAIT, RetryPolicy

INBOX: Final = "bk-inbox"
CORRELATION: Final = "bk-correlation"
ERROR: Final = "bk-error"
ERROR_TEXT: Final = "bk-error-text"


class Again(msgspec.Struct, frozen=True):
    """Run the message again in *wait* seconds."""

    wait: float
    error: str


class Die(msgspec.Struct, frozen=True):
    """Dead-letter the message.  *error* is a class name, *text* what the exception said, with secrets masked."""

    reason: str
    error: str
    text: str = ""


class Unanswerable(Exception):
    """What a handler returned is no reply, and would be none the next time either."""


def judge(error: BaseException, policy: RetryPolicy, failures: int, *, in_place: bool) -> Again | Die:
    """Say what becomes of a message whose attempt ended with *error*; *failures* counts this attempt too.

    *in_place*: the message waits where it is and holds its key, as topics' messages do.
    """
    if isinstance(error, Reject):
        return Die(redact(error.reason)[:MAX_REASON], "Reject")
    if isinstance(error, Unanswerable):
        cause = error.__cause__ or error
        return Die(
            f"what the handler returned is no reply: {error_text(cause)}"[:MAX_REASON],
            type(cause).__name__,
            error_text(cause),
        )
    if isinstance(error, Nack):
        longest = TOPIC_WAIT if in_place else MAX_DELAY
        if not 0 <= error.delay <= longest:  # NaN is not either
            why = ": a message of a topic holds its key while it waits" if in_place else ""
            error = ValueError(f"Nack(delay={error.delay:g}) is not from 0 to {longest:g} seconds{why}")
    name = type(error).__name__
    if not isinstance(error, (Nack, policy.on)) and isinstance(error, Exception):
        return Die(f"{name} is not retried", name, error_text(error))
    if failures >= policy.attempts:
        times = "attempt" if failures == 1 else "attempts"
        return Die(f"failed after {failures} {times}: {error_text(error)}"[:MAX_REASON], name, error_text(error))
    if isinstance(error, Nack):
        return Again(error.delay, name)
    return Again(policy.wait(failures, longest=TOPIC_WAIT if in_place else QUEUE_WAIT), name)


def retry_copy(record: Record, *, failures: int, wait: float, first_failed: float) -> Record:
    """Return the copy of a queue's *record* that is delivered again after *wait* seconds."""
    headers = record.headers
    if not any(name == FIRST_FAILED for name, _ in headers):
        headers = (*headers, (FIRST_FAILED, f"{first_failed:.6f}".encode()))
    return Record(
        address=record.address,
        id=record.id,
        body=record.body,
        key=record.key,
        headers=headers,
        timestamp=record.timestamp,
        delay=wait,
        expires=record.expires,
        priority=record.priority,
        attempts=failures,
    )


def first_failure(record: Record) -> float | None:
    """Return when *record* failed for the first time, if a retry copy carries it."""
    for name, value in record.headers:
        if name == FIRST_FAILED:
            try:
                return float(value)
            except ValueError:
                return None
    return None


def dead_letter(
    record: Record, letters: AnyDeadLetters, verdict: Die, *, failures: int, first_failed: float, now: float
) -> Record:
    """Return the letter that *record* becomes."""
    notes = {
        "reason": verdict.reason[:MAX_REASON],
        "error": verdict.error,
        "text": verdict.text[:MAX_REASON],
        "attempts": str(failures),
        "first": f"{first_failed:.6f}",
        "last": f"{now:.6f}",
        "origin": letters.of.name,
    }
    if letters.group is not None:
        notes["group"] = letters.group
    return Record(
        address=letters,
        id=record.id,
        body=record.body,
        key=record.key,
        headers=(
            *(item for item in record.headers if item[0] != FIRST_FAILED and not item[0].startswith(DEAD)),
            *((DEAD + name, text.encode("utf-8", "replace")) for name, text in notes.items()),
        ),
        timestamp=record.timestamp,
        priority=record.priority,
        attempts=failures,
    )


def reply_to(record: Record) -> tuple[bytes, bytes] | None:
    """Return inbox token and correlation id of a request; None where nobody waits for an answer."""
    inbox = correlation = None
    for name, value in record.headers:
        if name == INBOX:
            inbox = value
        elif name == CORRELATION:
            correlation = value
    # Both come from the network: only their size is trusted, and they choose no address.
    if inbox is None or correlation is None or not 0 < len(inbox) <= 64 or not 0 < len(correlation) <= 64:
        return None
    return inbox, correlation


def reply(
    replies: AnyTopic, to: tuple[bytes, bytes], id: str, body: bytes | None, content_type: str, now: float
) -> Record:
    """Return the record that answers a request with a value."""
    headers = ((CONTENT_TYPE, content_type.encode()), (CORRELATION, to[1]))
    return Record(address=replies, id=id, body=body, key=to[0], headers=headers, timestamp=now)


def failure_reply(replies: AnyTopic, to: tuple[bytes, bytes], id: str, verdict: Die, now: float) -> Record:
    """Return the record that answers a request with a final failure: the error's class and redacted text."""
    text = (verdict.text or verdict.reason)[:MAX_REASON]
    headers = ((CORRELATION, to[1]), (ERROR, verdict.error.encode()), (ERROR_TEXT, text.encode("utf-8", "replace")))
    return Record(address=replies, id=id, body=b"", key=to[0], headers=headers, timestamp=now)
