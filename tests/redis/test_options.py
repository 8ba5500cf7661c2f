"""What a Redis URL and its options may say, and what is made of it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection

from brokerkit.drivers._url import Options, Secret, Url, parse
from brokerkit.drivers.redis._options import Settings, settings
from brokerkit.drivers.redis._wire import connection
from brokerkit.errors import ConfigError, InsecureCredentials

CANARY = "s3cr3t-Canary"


def read(text: str, options: Mapping[str, object] = {}) -> Settings:
    """Return the settings of a URL, as `brokerkit.drivers.load` passes it on."""
    url: Url = parse(text)
    values = Options({**url.query, **options}, f"{url.scheme}://")
    made = settings(url, values)
    values.flag("insecure", default=False)
    values.finish()
    return made


@pytest.mark.parametrize(
    "url, expected",
    [
        ("redis://localhost", {"host": "localhost", "port": 6379, "database": 0, "tls": False, "username": ""}),
        ("redis://localhost/", {"database": 0}),
        ("redis://h:7000/12", {"host": "h", "port": 7000, "database": 12}),
        ("redis://[::1]:7000", {"host": "::1", "port": 7000, "shown": "redis://[::1]:7000/0"}),
        ("rediss://me@h/3", {"tls": True, "username": "me", "shown": "rediss://me@h:6379/3"}),
        ("redis+unix:///run/r.sock", {"socket": "/run/r.sock", "host": "", "database": 0}),
        ("redis+unix:///run/r.sock?db=4", {"database": 4, "shown": "redis+unix:///run/r.sock?db=4"}),
        ("redis://h", {"durability": "memory", "session": 10.0, "connect_timeout": 5.0, "timeout": 10.0}),
        ("redis://h?durability=aof&session=2&connect_timeout=1&timeout=3.5", {"durability": "aof", "timeout": 3.5}),
    ],
)
def test_a_url_says_where_and_how(url: str, expected: Mapping[str, object]) -> None:
    made = read(url)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    "url, text",
    [
        ("redis://a,b/0", "one host.*Sentinel"),
        ("redis:///0", "no host"),
        ("redis://h/one", "number of a database"),
        ("redis://h/1/2", "number of a database"),
        ("redis://h/-1", "number of a database"),
        ("redis://h?db=1", "is its path"),
        ("redis+unix://h/run/r.sock", "three slashes"),
        ("redis+unix://", "three slashes"),
        ("redis+unix:///", "three slashes"),
        ("redis+unix:///r?db=x", "db"),
        ("redis://h?durability=disk", "durability"),
        ("redis://h?session=0.4", "session"),
        ("redis://h?timeout=0", "timeout"),
        ("redis://h?ca_file=a", "ca_file is for TLS: use rediss"),
        ("redis+unix:///r?cert_file=a", "cert_file is for TLS"),
        ("rediss://h?key_file=a", "key_file needs cert_file"),
        ("redis://h?sesion=1", "did you mean 'session'"),
        (f"rediss://u:{CANARY}@h?password_file=f", "one of them is enough"),
    ],
)
def test_what_makes_no_sense_is_refused(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read(url)
    assert CANARY not in str(caught.value)


def test_a_password_file_is_refused_in_plain_text_as_a_password_is() -> None:
    with pytest.raises(InsecureCredentials, match="rediss://"):
        read("redis://far.example?password_file=f")
    for url in ("redis://127.0.0.1?password_file=f", "redis://far.example?password_file=f&insecure=true"):
        assert read(url).password_file == "f"


def test_a_password_is_in_no_text(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(CANARY)
    for made in (read(f"rediss://me:{CANARY}@h/0"), read("rediss://me@h/0", {"password_file": str(path)})):
        assert made.password() == Secret(CANARY)
        wire = connection(made)
        held = [getattr(wire, name, None) for name in ("password", "username", "credential_provider", "__dict__")]
        for shown in (repr(made), str(made), made.shown, repr(wire), repr(held)):
            assert CANARY not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(read(f"rediss://me:{CANARY}@h/0"))


async def credentials(made: Settings) -> tuple[str, ...] | None:
    """Return what a connection would log in with."""
    wire: Any = connection(made)
    return None if wire.credential_provider is None else await wire.credential_provider.get_credentials_async()


@pytest.mark.asyncio
async def test_a_password_file_is_read_again_for_each_connection(tmp_path: Path) -> None:
    path = tmp_path / "password"
    made = read("rediss://me@h/0", {"password_file": str(path)})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        connection(made)
    path.write_text("first\n")
    assert await credentials(made) == ("me", "first")
    path.write_text("second\r\n")
    assert await credentials(made) == ("me", "second")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        connection(made)
    path.write_bytes(b"\xff\xfe" + CANARY.encode())
    with pytest.raises(ConfigError, match="no UTF-8") as caught:
        connection(made)
    assert CANARY not in str(caught.value)


@pytest.mark.asyncio
async def test_one_logs_in_with_what_is_given() -> None:
    assert await credentials(read("redis://localhost")) is None
    assert await credentials(read("redis://:pw@localhost")) == ("pw",)
    assert await credentials(read("redis://me:pw@localhost")) == ("me", "pw")
    assert await credentials(read("redis://me@localhost")) == ("me", "")


def test_a_connection_is_of_the_right_kind_and_leaves_waiting_to_us() -> None:
    plain: Any = connection(read("redis://h:7000/2"))
    unix: Any = connection(read("redis+unix:///r.sock?db=1"))
    tls: Any = connection(read("rediss://h"))
    assert [type(wire) for wire in (plain, unix, tls)] == [Connection, UnixDomainSocketConnection, SSLConnection]
    assert (plain.host, plain.port, plain.db, unix.path, unix.db) == ("h", 7000, 2, "/r.sock", 1)
    for wire in (plain, unix, tls):
        assert wire.socket_timeout is None
        assert wire.retry._retries == 0
        assert wire.protocol == 3
        assert wire.health_check_interval == 0
        assert wire.client_name == "brokerkit"
        assert not wire.encoder.decode_responses


def test_tls_verifies_certificate_and_name_always() -> None:
    import ssl

    wire: Any = connection(read("rediss://h"))
    context: ssl.SSLContext = wire.ssl_context.get()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_files_of_certificates_are_looked_at_before_connecting(tmp_path: Path) -> None:
    missing, bad = tmp_path / "missing.pem", tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    for options, text in (
        ({"ca_file": str(missing)}, r"ca_file \(.*missing.pem\) cannot be used: No such file"),
        ({"ca_file": str(bad)}, r"ca_file \(.*bad.pem\) cannot be used"),
        ({"cert_file": str(missing)}, "cert_file"),
        ({"cert_file": str(bad), "key_file": str(missing)}, "cert_file or key_file"),
    ):
        with pytest.raises(ConfigError, match=text):
            connection(read("rediss://h", options))
