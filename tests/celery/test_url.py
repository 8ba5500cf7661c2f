"""URLs, TLS and options, as Celery users write them, and what brokerkit is told."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest
from kombu import Connection

from brokerkit import ConfigError, InsecureCredentials, connect
from brokerkit.celery import _hide, _options, _url
from brokerkit.drivers._url import Secret

CANARY = "canary-9f3b"


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has been warned about yet."""
    monkeypatch.setattr(_options, "_told", set())
    yield


def target(url: Any, **given: Any) -> _url.Target:
    return _url.target(Connection(url, **given))


def options(url: Any, **given: Any) -> dict[str, object]:
    return dict(target(url, connect_timeout=0, **given).options)


class TestWhere:
    @pytest.mark.parametrize(
        ("url", "goes"),
        [
            ("kafka://localhost:9092", "kafka://localhost:9092"),
            ("kafka://localhost", "kafka://localhost"),
            ("kafka://", "kafka://localhost"),
            ("kafka://localhost:9092//", "kafka://localhost:9092"),
            ("kafka+ssl://h:9093", "kafka+ssl://h:9093"),
            ("kafka://h1:9092;kafka://h2:9093", "kafka://h1:9092,h2:9093"),
            (["kafka://h1:9092", "kafka://h2"], "kafka://h1:9092,h2"),
            (["kafka://h1", "kafka://h1"], "kafka://h1"),
            ("kafka+ssl://h1;kafka+ssl://h2", "kafka+ssl://h1,h2"),
            ("brokerkit+kafka://h1:9092,h2:9093", "kafka://h1:9092,h2:9093"),
            ("brokerkit+kafka://h1;brokerkit+kafka://h2", "kafka://h1,h2"),
            ("brokerkit+kafka+ssl://h1", "kafka+ssl://h1"),
            ("confluentkafka://h1:9092;confluentkafka://h2:9092", "kafka://h1:9092,h2:9092"),
            ("brokerkit+redis://localhost", "redis://localhost"),
            ("brokerkit+redis://localhost:6379/3", "redis://localhost:6379/3"),
            ("brokerkit+redis://[::1]:6379/1", "redis://[::1]:6379/1"),
            ("brokerkit+rediss://h/0", "rediss://h/0"),
            ("brokerkit+redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
            ("brokerkit+redis+socket:///run/redis.sock", "redis+unix:///run/redis.sock"),
            ("brokerkit+memory://", "memory://celery"),
            ("brokerkit+memory://localhost//", "memory://celery"),
            ("brokerkit+memory://here", "memory://here"),
        ],
    )
    def test_a_url_of_celerys_is_one_of_brokerkits(self, url: Any, goes: str) -> None:
        found = target(url)
        assert found.url == goes
        connect(found.url, options=dict(found.options))

    @pytest.mark.parametrize(
        "url",
        [
            "brokerkit+redis://h1:6380/1;brokerkit+redis://h2:6381/2",
            ["brokerkit+redis://h1:6380/1", "brokerkit+redis://h2:6381/2"],
        ],
    )
    def test_of_several_redis_servers_the_next_one_is_taken_when_one_is_gone(self, url: Any) -> None:
        connection = Connection(url)
        assert _url.target(connection).url == "redis://h1:6380/1"
        connection.switch(next(connection.cycle))
        assert _url.target(connection).url == "redis://h2:6381/2"
        connection.switch(next(connection.cycle))
        assert _url.target(connection).url == "redis://h1:6380/1"

    @pytest.mark.parametrize(
        "url",
        [
            f"kafka://u:{CANARY}@h1:9092;kafka://u:{CANARY}@h2:9093",
            f"kafka://u:{CANARY}@h1:9092;kafka://h2:9093",
            f"brokerkit+kafka://u:{CANARY}@h1:9092;brokerkit+kafka://h2:9093",
            f"kafka+ssl://u:{CANARY}@h1:9092;kafka+ssl://h2:9093",
        ],
    )
    def test_the_hosts_of_a_cluster_are_one_target_whichever_kombu_is_at(self, url: str) -> None:
        connection = Connection(url)
        first = _url.target(connection)
        for other in islice(connection.cycle, 3):
            connection.switch(other)
            assert _url.target(connection) == first
        assert dict(first.options)["username"] == "u"
        assert dict(first.options)["password"] == Secret(CANARY)

    @pytest.mark.parametrize(
        "again",
        [lambda connection: connection.clone(), lambda connection: Connection(*connection.info().values())],
        ids=["clone", "pickle"],
    )
    @pytest.mark.parametrize("url", ["kafka://u:p@h1;kafka://h2", "brokerkit+redis://:p@h:6380/2?timeout=3"])
    def test_a_copy_of_a_connection_goes_where_it_goes(self, url: str, again: Any) -> None:
        connection = Connection(url, transport_options={"prefix": "a."}, ssl={"ca_certs": "ca.pem"})
        connection._transport = _Unused()
        assert _url.target(again(connection)) == _url.target(connection)

    def test_host_port_and_database_may_be_settings_of_their_own(self) -> None:
        connection = Connection("h", "u", CANARY, "5", 6380, transport="brokerkit+redis")
        found = _url.target(connection)
        assert found.url == "redis://h:6380/5"
        assert dict(found.options)["username"] == "u"
        assert dict(found.options)["password"] == Secret(CANARY)

    def test_the_password_may_come_from_a_function(self) -> None:
        assert options("brokerkit+redis://localhost", password=lambda: CANARY)["password"] == Secret(CANARY)

    def test_a_password_is_percent_decoded_once(self) -> None:
        assert options("kafka+ssl://u:a%2525%40b@h")["password"] == Secret("a%25@b")
        assert options("brokerkit+kafka+ssl://u:a%2525%40b@h")["password"] == Secret("a%25@b")

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("brokerkit://localhost", r"must begin with brokerkit\+kafka://"),
            ("brokerkit+amqp://localhost", r"must begin with .* not with brokerkit\+amqp://"),
            ("brokerkit+redis://localhost?tiemout=3", "tiemout.*timeout"),
            ("brokerkit+redis://localhost?queue_partitions=3", "queue_partitions"),
            ("kafka://h1:9092;brokerkit+kafka://h2?queue_partitions=2", "one host and no options"),
            ("brokerkit+kafka://h1,h2;brokerkit+kafka://h3", "one host and no options"),
        ],
    )
    def test_a_url_without_sense_is_refused(self, url: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            target(url)


class _Unused:
    default_connection_params: Mapping[str, object] = {}
    can_parse_url = False


class TestOptions:
    @pytest.mark.parametrize("system", ["kafka", "memory", "redis"])
    def test_every_option_of_brokerkits_urls_is_known(self, system: str) -> None:
        with pytest.raises(ConfigError, match="has no option") as refused:
            connect(f"{system}://localhost", options={"zzzzzzzz": 1})
        (listed,) = re.findall(r"there are: (.*)\)", str(refused.value))
        known = {*listed.split(", ")} | ({"db"} if system == "redis" else set())
        assert known == _options.KNOWN[system]

    def test_options_may_stand_in_the_settings_and_in_the_url(self) -> None:
        found = target(
            "brokerkit+redis://localhost?durability=aof&lease=20",
            transport_options={"timeout": 3, "prefix": "a.", "eta_window": 5},
            connect_timeout=2,
        )
        assert dict(found.options) == {"connect_timeout": 2.0, "durability": "aof", "prefix": "a.", "timeout": 3}
        assert dict(found.own) == {"lease": 20.0, "eta_window": 5.0}

    def test_an_option_given_twice_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="timeout is given twice"):
            target("brokerkit+redis://localhost?timeout=3", transport_options={"timeout": 3})
        with pytest.raises(ConfigError, match="password is given twice"):
            target("brokerkit+redis://:a@localhost", transport_options={"password": "b"})

    def test_an_option_of_other_transports_is_warned_about_once_and_harms_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        foreign = {"visibility_timeout": 3600, "polling_interval": 1, "brand_new": {}, "queue_partitions": 3}
        with caplog.at_level(logging.WARNING, "brokerkit.celery"):
            for _ in range(3):
                assert options("brokerkit+redis://localhost", transport_options=foreign) == {}
        (text,) = caplog.messages
        assert all(name in text for name in foreign)
        assert "ignores what it has not on redis: " in text
        assert "visibility_timeout (use lease)" in text

    def test_an_option_of_kombus_own_is_not_warned_about(self, caplog: pytest.LogCaptureFixture) -> None:
        generic = {
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 1,
            "interval_max": 2,
            "confirm_publish": True,
        }
        assert options("kafka://localhost", transport_options=generic) == {}
        assert caplog.messages == []

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"sesion": 3}, "sesion.*session"),
            ({"queue_partition": 3}, "queue_partition.*queue_partitions"),
            ({"leases": 3}, "leases.*lease"),
            ({"lease": 0}, "lease must be a number of seconds"),
            ({"lease": "soon"}, "lease must be a number of seconds"),
            ({"prefix": ["a"]}, "prefix must be a text"),
        ],
    )
    def test_a_misspelt_or_senseless_option_is_refused(self, given: dict[str, object], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            target("kafka://localhost", transport_options=given)

    def test_celerys_timeout_of_connecting_is_brokerkits(self) -> None:
        assert dict(target("kafka://localhost", connect_timeout=4).options) == {"connect_timeout": 4.0}
        given = target("kafka://localhost", connect_timeout=4, transport_options={"connect_timeout": 9})
        assert dict(given.options) == {"connect_timeout": 9}
        assert dict(target("brokerkit+memory://", connect_timeout=4).options) == {}

    def test_the_login_method_is_kafkas_mechanism(self) -> None:
        assert options("kafka+ssl://u:p@h", login_method="PLAIN")["sasl"] == "PLAIN"

    def test_equal_settings_share_what_is_connected(self) -> None:
        one, other = ({"prefix": prefix, "timeout": 3} for prefix in ("a.", "b."))
        url = f"kafka+ssl://u:{CANARY}@h"
        assert target(url, transport_options=one) == target(url, transport_options=dict(reversed(one.items())))
        assert len({target(url, transport_options=one), target(url, transport_options=one)}) == 1
        assert target(url, transport_options=one) != target(url, transport_options=other)


class TestTls:
    @pytest.mark.parametrize(
        ("plain", "safe"), [("kafka://h", "kafka+ssl://h"), ("brokerkit+redis://h/1", "rediss://h/1")]
    )
    def test_broker_use_ssl_asks_for_tls(self, plain: str, safe: str) -> None:
        assert target(plain, ssl=True).url == safe
        assert target(plain, ssl={"ca_certs": "ca.pem"}).url == safe

    @pytest.mark.parametrize("before", ["", "ssl_"])
    def test_its_files_are_brokerkits(self, before: str) -> None:
        given = {f"{before}ca_certs": "ca.pem", f"{before}certfile": "c.pem", f"{before}keyfile": "k.pem"}
        wanted = {"ca_file": "ca.pem", "cert_file": "c.pem", "key_file": "k.pem"}
        assert options("kafka://h", ssl=given) == wanted
        assert options("brokerkit+rediss://h", ssl=given) == wanted

    def test_they_may_stand_in_the_url(self) -> None:
        assert options("kafka+ssl://h?ssl_ca_certs=ca.pem") == {"ca_file": "ca.pem"}
        assert options("brokerkit+rediss://h?ssl_ca_certs=ca.pem") == {"ca_file": "ca.pem"}

    @pytest.mark.parametrize("less", [{"ssl_cert_reqs": ssl.CERT_NONE}, {"check_hostname": False}])
    def test_the_broker_is_verified_whatever_is_asked_for(
        self, less: dict[str, object], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert options("brokerkit+rediss://h", ssl=less) == {}
        (text,) = caplog.messages
        assert "verified all the same" in text

    def test_what_it_cannot_have_is_warned_about(self, caplog: pytest.LogCaptureFixture) -> None:
        assert options("kafka://h", ssl={"ssl_ciphers": "ALL"}) == {}
        assert "ssl_ciphers" in caplog.text

    @pytest.mark.parametrize(
        ("url", "given", "says"),
        [
            ("brokerkit+redis+unix:///run/redis.sock", True, "no TLS"),
            ("brokerkit+memory://", True, "no TLS"),
            ("kafka://h", ssl.create_default_context(), "SSLContext"),
            ("kafka://h", {"ca_certs": 5}, "ca_certs must be the path"),
        ],
    )
    def test_what_has_no_sense_is_refused(self, url: str, given: object, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            target(url, ssl=given)


class TestSecrets:
    def test_a_password_in_plaintext_is_refused_in_words_of_celery(self) -> None:
        for url in (f"kafka://u:{CANARY}@far:9092", f"brokerkit+kafka://u:{CANARY}@far:9092"):
            with pytest.raises(
                InsecureCredentials, match=r"far:9092.*kafka\+ssl://.*broker_transport_options"
            ) as refused:
                target(url).connect()
            assert CANARY not in str(refused.value)
        target(f"kafka://u:{CANARY}@far", transport_options={"insecure": True}).connect()
        target(f"kafka+ssl://u:{CANARY}@far").connect()

    def test_no_text_of_a_target_shows_it(self) -> None:
        found = target(f"kafka+ssl://u:{CANARY}@h", transport_options={"prefix": "a."})
        assert CANARY not in f"{found!r} {found} {found.options} {found.connect()!r}"
        given = target("brokerkit+redis://h", transport_options={"password": CANARY})
        assert CANARY not in f"{given!r} {given.options}"
        asked = target(f"brokerkit+rediss://h?password={CANARY}")
        assert CANARY not in f"{asked!r} {asked.options}"

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            (f"redis://u:{CANARY}@h/0", "redis://u:**@h/0"),
            (f"redis://:{CANARY}@h/0?password={CANARY}&timeout=3", "redis://:**@h/0?password=**&timeout=3"),
            (f"kafka://u:{CANARY}@h1:1,h2:2", "kafka://u:**@h1:1,h2:2"),
            (f"kafka://u:{CANARY}@h1;kafka://v:{CANARY}@h2", "kafka://u:**@h1;kafka://v:**@h2"),
            (f"redis://u:a;b@{CANARY}@h", "redis://u:**@h"),
            (f"redis://u:a/b#{CANARY}@h", "redis://u:**@h"),
            ("redis://h:1/2", "redis://h:1/2"),
            ("localhost", "localhost"),
        ],
    )
    def test_a_url_is_shown_without_it(self, url: str, shown: str) -> None:
        assert _hide.masked(url, "**") == shown


class TestOurs:
    @pytest.mark.parametrize(
        ("given", "ours"),
        [
            ("kafka://h", "brokerkit+kafka://h"),
            ("kafka+ssl://h", "brokerkit+kafka+ssl://h"),
            ("kafka://h1:9092,h2:9092?queue_partitions=2", "brokerkit+kafka://h1:9092,h2:9092?queue_partitions=2"),
            ("kafka://u:p@h1:1;kafka://h2:2", "brokerkit+kafka://u:p@h1:1,h2:2"),
            ("kafka://u:p@h1;kafka://v:p@h2", "brokerkit+kafka://u:p@h1;brokerkit+kafka://v:p@h2"),
            (["kafka://h1", "kafka://h2"], ["brokerkit+kafka://h1,h2"]),
            ("redis://h/0", "brokerkit+redis://h/0"),
            ("REDIS://h/0", "brokerkit+REDIS://h/0"),
            ("rediss://h?timeout=5", "brokerkit+rediss://h?timeout=5"),
            ("redis://h1/0;redis://h2/0", "brokerkit+redis://h1/0;brokerkit+redis://h2/0"),
            ("redis+socket:///run/redis.sock", "brokerkit+redis+socket:///run/redis.sock"),
            ("memory://", "brokerkit+memory://"),
            ("brokerkit+redis://h", "brokerkit+redis://h"),
            ("amqp://h//", "amqp://h//"),
            ("sqla+sqlite:///x.db", "sqla+sqlite:///x.db"),
            ("localhost", "localhost"),
            (None, None),
        ],
    )
    def test_the_app_takes_the_urls_that_brokerkit_has(self, given: object, ours: object) -> None:
        assert _url.ours(given) == ours
        assert _url.ours(ours) == ours
