"""What is said to log in, against the examples of the standards and against brokers that lie."""

from __future__ import annotations

import base64
import hashlib
import hmac
import traceback

import pytest

from brokerkit.drivers._url import Secret
from brokerkit.drivers.kafka._sasl import FEWEST, MOST, Plain, Salted, Scram, exchange
from brokerkit.errors import AuthenticationError, ConfigError

CANARY = "s3cr3t-Canary"
NONCE = "rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = f"{NONCE}%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"

pytestmark = pytest.mark.asyncio


async def test_plain_says_it_all_at_once() -> None:
    login = exchange("PLAIN", "tim", Secret("tanstaaftanstaaf"), {})
    assert isinstance(login, Plain)
    assert login.begin() == b"\0tim\0tanstaaftanstaaf"
    assert await login.go_on(b"") is None


async def test_the_example_of_rfc_7677() -> None:
    login = Scram("SCRAM-SHA-256", "user", Secret("pencil"), {}, NONCE)
    assert login.begin() == f"n,,n=user,r={NONCE}".encode()
    said = f"r={SERVER_NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".encode()
    expected = f"c=biws,r={SERVER_NONCE},p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    assert await login.go_on(said) == expected.encode()
    assert await login.go_on(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=") is None
    assert await login.go_on(b"") is None


@pytest.mark.parametrize("rounds", [4096, 30_000])
@pytest.mark.parametrize("mechanism, name", [("SCRAM-SHA-256", "sha256"), ("SCRAM-SHA-512", "sha512")])
async def test_both_sides_prove_that_they_know_the_password(mechanism: str, name: str, rounds: int) -> None:
    """The broker's side as RFC 5802 has it; a user name may have the characters that separate fields."""
    login = exchange(mechanism, "a=b,c", Secret("pä"), {})
    first = login.begin().decode().removeprefix("n,,")
    assert first.startswith("n=a=3Db=2Cc,r=")
    nonce = first.partition(",r=")[2] + "more"
    second = f"r={nonce},s={base64.b64encode(b'salt').decode()},i={rounds}"
    answer = await login.go_on(second.encode())
    assert answer is not None
    without, _, proof = answer.decode().partition(",p=")
    salted = hashlib.pbkdf2_hmac(name, "pä".encode(), b"salt", rounds)
    told = f"{first},{second},{without}".encode()
    stored = hashlib.new(name, hmac.digest(salted, b"Client Key", name)).digest()
    signature = hmac.digest(stored, told, name)
    key = bytes(one ^ other for one, other in zip(base64.b64decode(proof), signature, strict=True))
    assert hashlib.new(name, key).digest() == stored
    server = hmac.digest(hmac.digest(salted, b"Server Key", name), told, name)
    assert await login.go_on(b"v=" + base64.b64encode(server)) is None


async def test_numbers_are_used_once() -> None:
    assert len({exchange("SCRAM-SHA-512", "u", Secret("p"), {}).begin() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "said, text",
    [
        (b"", "as SCRAM says"),
        (b"\xff", "as SCRAM says"),
        (b"e=other-error", "as SCRAM says"),
        (f"r={NONCE},s=QQ==,i=4096".encode(), "as SCRAM says"),
        (b"r=another,s=QQ==,i=4096", "as SCRAM says"),
        (f"r={SERVER_NONCE},s=,i=4096".encode(), "as SCRAM says"),
        (f"r={SERVER_NONCE},s=?,i=4096".encode(), "as SCRAM says"),
        (f"r={SERVER_NONCE},s=QQ==".encode(), "0 rounds"),
        (f"r={SERVER_NONCE},s=QQ==,i=-1".encode(), "0 rounds"),
        (f"r={SERVER_NONCE},s=QQ==,i={FEWEST - 1}".encode(), "4095 rounds"),
        (f"r={SERVER_NONCE},s=QQ==,i={MOST + 1}".encode(), "1000001 rounds"),
        (f"r={SERVER_NONCE},s=QQ==,i={'9' * 5000}".encode(), "0 rounds"),
    ],
)
async def test_a_broker_that_speaks_differently_is_refused(said: bytes, text: str) -> None:
    login = Scram("SCRAM-SHA-512", "user", Secret(CANARY), {}, NONCE)
    with pytest.raises(AuthenticationError, match=text) as caught:
        await login.go_on(said)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("said", [b"", b"e=invalid-proof", b"v=", b"v=QQ==", b"v=?"])
async def test_a_broker_that_does_not_know_the_password_is_refused(said: bytes) -> None:
    login = Scram("SCRAM-SHA-256", "user", Secret("pencil"), {}, NONCE)
    assert await login.go_on(f"r={SERVER_NONCE},s=QQ==,i=4096".encode()) is not None
    with pytest.raises(AuthenticationError):
        await login.go_on(said)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
@pytest.mark.parametrize("username, password", [("a\0b", "p"), ("a", "p\0q")])
async def test_a_nul_would_end_the_name_or_the_password(mechanism: str, username: str, password: str) -> None:
    with pytest.raises(ConfigError, match="NUL"):
        exchange(mechanism, username, Secret(password), {})


async def test_a_password_is_hashed_once_for_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    salted: Salted = {}
    hashed: list[tuple[bytes, bytes]] = []

    def count(name: str, password: bytes, salt: bytes, rounds: int) -> bytes:
        hashed.append((password, salt))
        return b"salted" + password + salt

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", count)

    async def log_in(password: str, salt: str) -> bytes | None:
        login = Scram("SCRAM-SHA-256", "user", Secret(password), salted, NONCE)
        return await login.go_on(f"r={SERVER_NONCE},s={salt},i=4096".encode())

    first = await log_in("one", "QQ==")
    assert await log_in("one", "QQ==") == first
    assert await log_in("two", "QQ==") != first
    assert await log_in("two", "Qg==") not in {None, first}
    assert await log_in("one", "QQ==") == first
    assert hashed == [(b"one", b"A"), (b"two", b"A"), (b"two", b"B"), (b"one", b"A")]
    assert len(salted) == 1
