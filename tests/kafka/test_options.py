"""What a Kafka URL and its options may say, and what is made of it."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest

from brokerkit.drivers._url import Options, Secret, Url, parse
from brokerkit.drivers.kafka._options import Settings, settings
from brokerkit.errors import ConfigError, InsecureCredentials

CANARY = "s3cr3t-Canary"


def read(text: str, options: Mapping[str, object] = {}) -> Settings:
    """Return the settings of a URL, as `brokerkit.drivers.load` passes it on."""
    url: Url = parse(text)
    values = Options({**url.query, **options}, f"{url.scheme}://")
    made = settings(url, values)
    values.finish()
    return made


@pytest.mark.parametrize(
    "url, expected",
    [
        ("kafka://localhost", {"hosts": (("localhost", 9092),), "tls": False, "username": "", "sasl": ""}),
        ("kafka://localhost/", {"hosts": (("localhost", 9092),)}),
        ("kafka://a:1,b,c:3,a:1", {"hosts": (("a", 1), ("b", 9092), ("c", 3)), "shown": "kafka://a:1,b:9092,c:3"}),
        ("kafka://[::1]:7000", {"hosts": (("::1", 7000),), "shown": "kafka://[::1]:7000"}),
        ("kafka+ssl://h", {"tls": True, "shown": "kafka+ssl://h:9092"}),
        ("kafka+ssl://me:pw@h:9093", {"username": "me", "shown": "kafka+ssl://me@h:9093"}),
        ("kafka+ssl://me:pw@h?sasl=PLAIN", {"sasl": "PLAIN"}),
        ("kafka+ssl://h?ca_file=a&cert_file=b&key_file=c", {"ca_file": "a", "cert_file": "b", "key_file": "c"}),
        ("kafka://h", {"session": 10.0, "connect_timeout": 5.0, "timeout": 10.0, "insecure": False}),
        ("kafka://h", {"replication": -1, "compression": "none", "instance": ""}),
        ("kafka://h?session=6&connect_timeout=1&timeout=3.5", {"session": 6, "connect_timeout": 1, "timeout": 3.5}),
        ("kafka://h?replication=3&compression=gzip&instance=pod-1", {"replication": 3, "instance": "pod-1"}),
        ("kafka://me:pw@far.example?insecure=true", {"insecure": True}),
    ],
)
def test_a_url_says_where_and_how(url: str, expected: Mapping[str, object]) -> None:
    made = read(url)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    "url, text",
    [
        ("kafka://", "no host"),
        ("kafka:///", "no host"),
        ("kafka://h/orders", "ends with its hosts"),
        ("kafka://h?session=0.9", "session"),
        ("kafka://h?timeout=0", "timeout"),
        ("kafka://h?connect_timeout=0", "connect_timeout"),
        ("kafka://h?replication=0", "at least 1"),
        ("kafka://h?replication=-2", "replication"),
        ("kafka://h?compression=brotli", "compression cannot be 'brotli'"),
        ("kafka://h?instance=.a", "instance takes"),
        ("kafka://h?instance=a/b", "instance takes"),
        (f"kafka://h?instance={'a' * 101}", "at most 100"),
        ("kafka://h?ca_file=a", r"ca_file is for TLS: use kafka\+ssl"),
        ("kafka+ssl://h?key_file=a", "key_file needs cert_file"),
        ("kafka://h?sesion=1", "did you mean 'session'"),
        ("kafka+ssl://me:pw@h?sasl=SCRAM", "sasl cannot be 'SCRAM'"),
        ("kafka+ssl://h?sasl=PLAIN", "give user name and password"),
        ("kafka+ssl://me@h", "without its password"),
        (f"kafka+ssl://:{CANARY}@h", "without the user name"),
        ("kafka+ssl://h?password_file=f", "without the user name"),
        (f"kafka+ssl://u:{CANARY}@h?password_file=f", "one of them is enough"),
    ],
)
def test_what_makes_no_sense_is_refused(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read(url)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("login", [f"me:{CANARY}@far.example", "me@far.example?password_file=f"])
def test_a_password_does_not_travel_in_plain_text(login: str) -> None:
    with pytest.raises(InsecureCredentials, match=r"to far\.example; use kafka\+ssl://") as caught:
        read(f"kafka://{login}")
    assert CANARY not in str(caught.value)
    assert read(f"kafka://{login}{'&' if '?' in login else '?'}insecure=true").username == "me"
    assert read(f"kafka+ssl://{login}").username == "me"


def test_one_far_host_among_near_ones_is_enough() -> None:
    with pytest.raises(InsecureCredentials, match=r"far\.example"):
        read("kafka://me:pw@127.0.0.1,localhost,[::1],far.example")
    assert len(read("kafka://me:pw@127.0.0.1,localhost,[::1]").hosts) == 3


def test_a_broker_that_the_cluster_names_elsewhere_gets_no_password_either() -> None:
    made = read("kafka://me:pw@localhost")
    made.admit("127.0.0.1")
    with pytest.raises(InsecureCredentials, match=r"k1\.internal"):
        made.admit("k1.internal")
    read("kafka://localhost").admit("k1.internal")
    read("kafka+ssl://me:pw@localhost").admit("k1.internal")
    read("kafka://me:pw@localhost?insecure=true").admit("k1.internal")


def test_a_password_is_in_no_text(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(CANARY)
    for made in (read(f"kafka+ssl://me:{CANARY}@h"), read("kafka+ssl://me@h", {"password_file": str(path)})):
        assert made.password() == Secret(CANARY)
        for shown in (repr(made), str(made), made.shown):
            assert CANARY not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(read(f"kafka+ssl://me:{CANARY}@h").secret)


def test_a_password_file_is_read_again_each_time(tmp_path: Path) -> None:
    path = tmp_path / "password"
    made = read("kafka+ssl://me@h", {"password_file": str(path)})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        made.password()
    path.write_text("first\n")
    assert made.password() == Secret("first")
    path.write_text("second\r\n")
    assert made.password() == Secret("second")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        made.password()
    path.write_bytes(b"\xff\xfe" + CANARY.encode())
    with pytest.raises(ConfigError, match="no UTF-8") as caught:
        made.password()
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("name", ["snappy", "lz4", "zstd"])
def test_a_compression_that_is_not_installed_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(module: str) -> object:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match=f"compression={name} needs cramjam: pip install"):
        read(f"kafka://h?compression={name}")
    monkeypatch.setattr(importlib.util, "find_spec", str)
    assert read(f"kafka://h?compression={name}").compression == name
