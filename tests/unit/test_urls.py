"""URLs and options of every scheme: what is accepted, what is refused, and that no password is ever shown."""

from __future__ import annotations

import copy
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerkit import drivers
from brokerkit.driver import Driver
from brokerkit.drivers import Loaded, load
from brokerkit.drivers._url import Options, Secret, Url, nearest, parse
from brokerkit.drivers.memory import MemoryDriver
from brokerkit.errors import ConfigError, InsecureCredentials, InvalidName
from brokerkit.events import Event

CANARY = "s3cr3t-Canary"


def listen(event: Event) -> None:
    """Hear nothing."""


class Probe:
    """A driver that only remembers what it was made with."""

    made: ClassVar[list[Probe]] = []

    def __init__(self, url: Url, options: Options, emit: Callable[[Event], None]) -> None:
        self.url = url
        self.count = options.whole("count", 3, low=1, high=9)
        self.wait = options.seconds("wait", 1.5)
        self.tls = options.flag("tls", default=True)
        self.mode = options.choice("mode", "fast", ["fast", "safe"])
        self.label = options.text("label")
        self.token = options.secret("token")
        self.made.append(self)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> type[Probe]:
    """Let every scheme make probes."""
    monkeypatch.setattr(drivers, "_factory", lambda *_: Probe)
    return Probe


def probed(url: str, **options: object) -> tuple[Probe, Loaded]:
    loaded = load(url, options, listen)
    driver: Any = loaded.driver
    assert isinstance(driver, Probe)
    return driver, loaded


def refused(url: str, options: Mapping[str, object] | None = None, error: type[ConfigError] = ConfigError) -> str:
    """Return the text of the error, in whose traceback no canary may show."""
    with pytest.raises(error) as caught:
        load(url, options or {}, listen)
    shown = "".join(traceback.format_exception(caught.value))
    assert CANARY not in str(caught.value) + repr(caught.value)
    assert CANARY not in shown.replace(url, "")
    return str(caught.value)


def test_a_memory_url_makes_the_memory_driver() -> None:
    loaded = load("memory://", {}, listen)
    driver: Driver = loaded.driver
    assert isinstance(driver, MemoryDriver)
    assert (loaded.prefix, loaded.shown) == ("", "memory://")
    assert load("memory://shop", {}, listen).shown == "memory://shop"
    assert load("MEMORY://shop?prefix=staging.", {}, listen).prefix == "staging."


@pytest.mark.parametrize(("backend", "library"), [("redis", "redis"), ("kafka", "aiokafka"), ("kafka", "kio")])
def test_a_driver_whose_client_library_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend: str, library: str
) -> None:
    for name in [name for name in sys.modules if name.startswith((f"brokerkit.drivers.{backend}", f"{library}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install 'brokerkit[{backend}]'" in refused(f"{backend}://host")


@pytest.mark.parametrize(
    ("url", "near"),
    [("rediz://h", "redis"), ("kafka+tls://h", "kafka+ssl"), ("memry://", "memory"), ("kakfa://h", "kafka")],
)
def test_an_unknown_scheme_names_the_nearest(url: str, near: str) -> None:
    text = refused(url)
    assert "unknown scheme" in text
    assert f"did you mean {near!r}?" in text


def test_an_unknown_scheme_near_to_none_names_all() -> None:
    text = refused("https://example.org")
    assert all(scheme in text for scheme in ("memory", "redis", "rediss", "redis+unix", "kafka", "kafka+ssl"))


@pytest.mark.parametrize("url", ["", "localhost:6379", "redis:/host", "//host", "redis", ":memory:", "1x://h"])
def test_a_url_without_a_scheme_is_refused(url: str) -> None:
    assert "begins with its scheme" in refused(url)


def test_a_url_that_is_no_text_is_refused() -> None:
    wrong: Any = b"memory://"
    with pytest.raises(ConfigError, match="text, not bytes"):
        load(wrong, {}, listen)


# ---------------------------------------------------------------------- the parts of a URL


def test_the_parts_of_a_url_are_percent_decoded() -> None:
    url = parse("rediss://us%65r%3A:p%40ss%2Fw%3Ford%23@[::1]:6380/%30?label=a%26b%3Dc")
    assert (url.scheme, url.username, url.path) == ("rediss", "user:", "/0")
    assert url.password is not None
    assert url.password.reveal() == "p@ss/w?ord#"
    assert url.hosts == (("::1", 6380),)
    assert url.query == {"label": "a&b=c"}


def test_a_plus_in_a_password_is_a_plus() -> None:
    password = parse("rediss://:a+b@h").password
    assert password is not None
    assert password.reveal() == "a+b"


def test_several_hosts_keep_their_order() -> None:
    url = parse("kafka://k1:9092,k2,10.0.0.3:9094,[fe80::1]:1")
    assert url.hosts == (("k1", 9092), ("k2", None), ("10.0.0.3", 9094), ("fe80::1", 1))
    assert str(url) == "kafka://k1:9092,k2,10.0.0.3:9094,[fe80::1]:1"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        (f"redis://:{CANARY}/x@host:6379", "%2F"),
        (f"redis://:{CANARY}?x@host:6379", "%2F and %3F"),
        (f"redis://:{CANARY}#x@host:6379", "%23"),
        (f"redis://user:{CANARY}/0", "1 to 65535"),
        (f"redis://:{CANARY}%zz@host", "%25"),
        (f"redis://:{CANARY}%ff@host", "UTF-8"),
        (f"redis://: {CANARY}@host", "blanks"),
        (f"redis://:{CANARY}\n@host", "blanks"),
        ("redis://@host", "no user name"),
        ("redis://:@host", "no user name"),
        ("redis://host:0", "1 to 65535"),
        ("redis://host:65536", "1 to 65535"),
        ("redis://host:", "1 to 65535"),
        ("redis://host:٣", "1 to 65535"),
        ("redis://ho st", "blanks"),
        ("redis://h*st", "host name"),
        ("kafka://a,,b", "host name"),
        ("kafka://a,", "host name"),
        ("redis://[::1", "IPv6"),
        ("redis://[::1]x", "IPv6"),
        ("redis://[host]", "IPv6"),
        ("redis://h?", None),
        ("redis://h?=1", "without a name"),
        ("redis://h?label", "no value"),
        ("redis://h?label=", "no value"),
        ("redis://h?label=1&label=2", "twice"),
        ("redis://h?l%61bel=1&label=2", "twice"),
        ("redis://h?&", "without a name"),
        ("redis://h?label=%z", "%25"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(probe: type[Probe], url: str, hint: str | None) -> None:
    if hint is None:
        assert probed(url)
    else:
        assert hint in refused(url)


@given(st.text())
def test_no_text_makes_anything_but_a_config_error(text: str) -> None:
    for url in (text, f"memory://{text}", f"redis://{text}"):
        try:
            parsed = parse(url)
        except ConfigError:
            continue
        assert parsed.scheme


@given(user=st.text(min_size=1), password=st.text(min_size=1))
def test_any_user_name_and_password_survive_the_way_through_a_url(user: str, password: str) -> None:
    try:
        url = parse(f"rediss://{quote(user, safe='')}:{quote(password, safe='')}@host")
    except UnicodeEncodeError:
        return  # a lone surrogate is no text that could be in a URL
    assert url.username == user
    assert url.password == Secret(password)


# ---------------------------------------------------------------------- secrets


def test_a_secret_shows_nothing_and_is_not_pickled() -> None:
    secret = Secret(CANARY)
    assert f"{secret}{secret!r}{[secret]}{secret!s:>10}".count("***") == 4
    assert CANARY not in f"{secret} {secret!r} {vars(type(secret))}"
    assert (secret == Secret(CANARY), secret == CANARY, secret == Secret("x")) == (True, False, False)
    assert len({secret, Secret(CANARY)}) == 1
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(secret)
    assert CANARY not in repr(copy.copy(parse(f"rediss://:{CANARY}@h")))


def test_the_shown_url_masks_every_secret(probe: type[Probe]) -> None:
    driver, loaded = probed(f"rediss://ann:{CANARY}@h:1/0?token={CANARY}&label=x")
    assert loaded.shown == "rediss://ann:***@h:1/0?token=***&label=x"
    assert CANARY not in f"{loaded!r}{driver.url!r}{driver.url}{driver.token}"
    assert driver.token == Secret(CANARY)
    driver, loaded = probed("rediss://h", username="ann", password=CANARY, token=CANARY)
    assert loaded.shown == "rediss://ann:***@h"
    assert driver.url.password == Secret(CANARY)
    assert driver.token == Secret(CANARY)
    options = Options({"ssl_password": CANARY, "sasl_secret": CANARY, "label": "x"}, "redis://")
    assert repr(options) == "<Options ssl_password='***', sasl_secret='***', label='x'>"


@pytest.mark.parametrize(("url", "tls"), [("redis://{}@h", "rediss://"), ("kafka://{}@h:1,127.0.0.1", "kafka+ssl://")])
def test_a_password_on_a_plaintext_connection_is_refused(probe: type[Probe], url: str, tls: str) -> None:
    text = refused(url.format(f"ann:{CANARY}"), error=InsecureCredentials)
    assert tls in text
    assert "insecure=true" in text
    assert refused(url.replace("{}@", ""), {"password": CANARY}, InsecureCredentials)
    assert refused(url.replace("{}@", ""), {"password": Secret(CANARY)}, InsecureCredentials)
    assert probed(url.format(f"ann:{CANARY}") + "?insecure=true")
    assert probed(url.format(f"ann:{CANARY}"), insecure=True)
    assert refused(url.format(f"ann:{CANARY}"), {"insecure": False}, InsecureCredentials)
    assert probed(url.format("ann"))


@pytest.mark.parametrize(
    "url",
    [
        "rediss://:p@example.org",
        "kafka+ssl://a:p@example.org",
        "redis+unix://:p@/run/redis.sock",
        "redis://:p@localhost:6379",
        "redis://:p@127.0.0.1",
        "redis://:p@127.8.8.8",
        "redis://:p@[::1]",
        "kafka://a:p@127.0.0.1:1,localhost:2",
    ],
)
def test_a_password_over_tls_or_within_the_machine_is_no_matter(probe: type[Probe], url: str) -> None:
    assert probed(url)[0].url.password == Secret("p")


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost.example.org", "10.0.0.1", "[::2]", "LOCALHOST.evil.org"])
def test_what_only_looks_like_loopback_is_none(probe: type[Probe], host: str) -> None:
    assert refused(f"redis://:{CANARY}@{host}", error=InsecureCredentials)


def test_credentials_are_given_once(probe: type[Probe]) -> None:
    assert "password is given twice" in refused(f"rediss://ann:{CANARY}@h", {"password": "x"})
    assert "username is given twice" in refused(f"rediss://ann:{CANARY}@h?username=bob")
    assert probed(f"rediss://ann@h?password={CANARY}")[0].url.password == Secret(CANARY)


# ---------------------------------------------------------------------- options


def test_options_have_the_same_names_in_the_query_and_in_the_call(probe: type[Probe]) -> None:
    text = "redis://h?count=5&wait=2.5&tls=false&mode=safe&label=l&token=t"
    one, _ = probed(text)
    two, _ = probed("redis://h", count=5, wait=2.5, tls=False, mode="safe", label="l", token="t")
    for driver in (one, two):
        assert (driver.count, driver.wait, driver.tls, driver.mode, driver.label) == (5, 2.5, False, "safe", "l")
        assert driver.token == Secret("t")
    three, _ = probed("redis://h?count=5", wait=7)
    assert (three.count, three.wait, three.tls, three.mode, three.label, three.token) == (
        5,
        7.0,
        True,
        "fast",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_what_is_true_and_what_is_false(probe: type[Probe], text: str, value: bool) -> None:
    assert probed(f"redis://h?tls={text}")[0].tls is value


@pytest.mark.parametrize(
    ("query", "options", "hint"),
    [
        ("tls=yes", {}, "tls must be true or false, not 'yes'"),
        ("", {"tls": 1}, "tls must be true or false, not 1"),
        ("count=0", {}, "count must be a whole number from 1 to 9"),
        ("count=10", {}, "count"),
        ("count=1.0", {}, "count"),
        ("count=x", {}, "count"),
        ("count=1_0", {}, "count"),
        ("count=%D9%A3", {}, "count"),
        ("", {"count": True}, "count"),
        ("", {"count": "x"}, "count"),
        ("wait=-1", {}, "wait must be a number of seconds"),
        ("wait=nan", {}, "wait"),
        ("wait=inf", {}, "wait"),
        ("wait=1e3", {}, "wait"),
        ("", {"wait": float("nan")}, "wait"),
        ("mode=saef", {}, "did you mean 'safe'?"),
        ("", {"label": 5}, "label must be a text, not int"),
        ("", {"token": ""}, "token must be a text that is not empty"),
        ("", {"token": 5}, "token"),
        ("cuont=5", {}, "redis:// has no option 'cuont' (did you mean 'count'?)"),
        ("", {"lable": "x"}, "did you mean 'label'?"),
        ("", {"pasword": "x"}, "did you mean 'password'?"),
        ("", {"zzz": 1}, "there are: count, insecure, label"),
        ("insecure=maybe", {}, "insecure must be true or false"),
        ("count=5", {"count": 5}, "count is given twice"),
        ("", {5: 5}, "names of options are texts"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    probe: type[Probe], query: str, options: dict[Any, object], hint: str
) -> None:
    assert hint in refused(f"redis://h{'?' if query else ''}{query}", options)


@pytest.mark.parametrize("prefix", ["..", "a b", "x" * 21, ".a", "ä"])
def test_a_prefix_keeps_the_naming_rules(prefix: str) -> None:
    assert "prefix" in refused("memory://", {"prefix": prefix}, InvalidName)


def test_no_prefix_may_be_said_aloud() -> None:
    assert load("memory://", {"prefix": ""}, listen).prefix == ""


@pytest.mark.parametrize(
    ("url", "options", "hint"),
    [
        ("memory://ann@h", {}, "no user name"),
        (f"memory://ann:{CANARY}@h", {}, "no user name"),
        ("memory://h:1", {}, "takes a name"),
        ("memory://a,b", {}, "takes a name"),
        ("memory://h/0", {}, "takes a name"),
        ("memory://.h", {}, "name of a memory server"),
        ("memory://bk", {}, "reserved"),
        ("memory://?max_mesages=5", {}, "did you mean 'max_messages'?"),
        ("memory://?max_messages=0", {}, "max_messages"),
        ("memory://?session=0", {}, "session"),
        ("memory://", {"username": "ann"}, "no option 'username'"),
        ("memory://", {"password": CANARY}, "no option 'password'"),
    ],
)
def test_the_memory_driver_refuses_what_it_has_not(url: str, options: dict[str, object], hint: str) -> None:
    assert hint in refused(url, options)


def test_nearest_names_one_or_all_or_nothing() -> None:
    assert nearest("cuont", ["count", "wait"]) == " (did you mean 'count'?)"
    assert nearest("zzz", ["wait", "count"]) == " (there are: count, wait)"
    assert nearest("zzz", []) == ""
