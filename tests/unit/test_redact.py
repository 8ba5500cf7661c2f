"""No secret gets into a log, a dead letter or an error text."""

from __future__ import annotations

import json
import time

import pytest

from brokerkit._redact import MASK, error_text, redact
from brokerkit.policy import MAX_REASON

CANARY = "c4n4ry"

WHERE = [
    "redis://user:{}@host:6379/0",
    "redis://:{}@host",
    "redis://:{}@te@host",
    "rediss://user:a/b?c#{}@host/0",
    "kafka+ssl://user:{}@k1:9092,k2:9092?prefix=x",
    "cannot connect to 'redis://user:{}@host': refused",
    '{{"url":"amqp://user:{}@host","mail":"ann@example.org"}}',
    "password={}",
    "PASSWORD = {}",
    "password: {}",
    "--password={} --user=ann",
    "?user=ann&password={}&db=0",
    "connect(host='h', password='{}', db=0)",
    "connect(password=b'{}')",
    "connect(password='with \\' quote {}')",
    "{{'sasl_plain_password': 'a b {}', 'port': 1}}",
    '{{"sasl_password": "{}"}}',
    '"{{\\"password\\": \\"{}\\", \\"port\\": 1}}"',
    'sasl.jaas.config=org.apache.Scram required username="u" password="{}";',
    "password='cut off {}",
    'password="on several\nlines {}\nof text"',
    "token={}",
    "access_token: {}",
    "api_key={}",
    "X-Api-Key: {}",
    "aws_secret_access_key = {}",
    "client_secret='{}'",
    "credentials={}",
    "passphrase={}",
    "Authorization: Bearer {}",
    "Authorization: Basic {} more",
    "Authorization: {}\r\nHost: h",
    "headers={{'Authorization': 'Bearer {}', 'Host': 'h'}}",
    "sent Bearer {}",
    "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\n{} cut off",
    "first line\nsecond: redis://user:{}@host\nthird line",
]


@pytest.mark.parametrize("text", WHERE)
def test_masks_the_secret(text: str) -> None:
    written = text.format(CANARY)
    assert CANARY in written
    assert CANARY not in redact(written)
    assert MASK in redact(written)


def test_masks_a_json_web_token() -> None:
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
    assert redact(f"refused {token} there") == f"refused {MASK} there"


@pytest.mark.parametrize(
    "before, after",
    [
        ("redis://user:x@host:1/0 is down", f"redis://user:{MASK}@host:1/0 is down"),
        ("a password='x', b='y'", f"a password={MASK}, b='y'"),
        ("?password=x&db=0", f"?password={MASK}&db=0"),
        ("Authorization: Basic x\nHost: h", f"Authorization: {MASK}\nHost: h"),
        ("-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\nrest", f"-----BEGIN PRIVATE KEY-----{MASK}\nrest"),
    ],
)
def test_leaves_what_stands_around_it(before: str, after: str) -> None:
    assert redact(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "",
        "redis://host:6379/0 is down",
        "https://example.org:80/a?b=c",
        "the passwords do not match",
        "unexpected token in line 3",
        "Expected `str`, got `int` - at `$.password`",
        "ann@example.org",
        "compass=3",
        "KeyError: 'total'",
    ],
)
def test_leaves_text_without_secrets_alone(text: str) -> None:
    assert redact(text) == text


def test_a_text_made_to_be_slow_is_not() -> None:
    slow = [
        "://a:",
        "password",
        "password='" + "\\" * 9,
        "a",
        "token:",
        'pwd=\\"',
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "\\",
    ]
    for piece in slow:
        text = piece * (200_000 // len(piece))
        began = time.process_time()
        redact(text)
        assert time.process_time() - began < 5, piece


def test_error_text_is_one_printable_line_without_secrets() -> None:
    error = ValueError(f"line one\n\tline two \x1b[31m\x00 redis://u:{CANARY}@h")
    assert error_text(error) == f"line one line two ?[31m? redis://u:{MASK}@h"


def test_error_text_is_cut_and_never_in_the_middle_of_a_secret() -> None:
    for before in range(MAX_REASON - 40, MAX_REASON + 10):
        text = error_text(ValueError("x" * before + f" redis://u:{CANARY}@host"))
        assert len(text) <= MAX_REASON
        assert CANARY[:3] not in text
    assert error_text(ValueError("x" * MAX_REASON)) == "x" * MAX_REASON
    assert error_text(ValueError("x" * (MAX_REASON + 1))) == "x" * (MAX_REASON - 3) + "..."
    assert len(error_text(ValueError("x" * 10_000_000))) == MAX_REASON


def test_an_error_that_says_nothing_is_its_class() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert error_text(TimeoutError()) == "TimeoutError"
    assert error_text(Broken()) == "Broken"


def test_a_group_of_one_says_what_its_error_says() -> None:
    assert error_text(ExceptionGroup("unhandled", [ExceptionGroup("again", [ValueError("this one")])])) == "this one"
    assert error_text(ExceptionGroup("unhandled", [ValueError("a"), ValueError("b")])) == "unhandled (2 sub-exceptions)"


def test_json_of_a_configuration_keeps_its_shape() -> None:
    text = redact(json.dumps({"host": "h", "password": CANARY, "port": 1}))
    assert text == '{"host": "h", "password": ***, "port": 1}'
