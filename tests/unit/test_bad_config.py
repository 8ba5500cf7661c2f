"""Bad URLs, options, names and policies: refused where they are written, before any I/O."""

from __future__ import annotations

import math
import pickle
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest

from brokerkit import (
    ConfigError,
    InsecureCredentials,
    InvalidName,
    Queue,
    RetryPolicy,
    Service,
    Start,
    Topic,
    connect,
)
from brokerkit.address import internal
from brokerkit.policy import Batch

CANARY = "canary-9f3b"


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("", "scheme|URL"),
            ("memory", "scheme|URL|://"),
            ("memory:", "scheme|URL|://"),
            ("memroy://", "memory"),
            ("http://host", "scheme"),
            ("memory://?nonsense=1", "nonsense"),
            ("memory://?max_mesages=5", "max_messages"),
            ("memory://?max_messages=many", "max_messages"),
            ("memory://?max_messages=-1", "max_messages"),
            ("memory://?session=0", "session"),
            ("memory://?session=nan", "session"),
            ("memory://?insecure=maybe", "insecure"),
            ("memory://?prefix=a..b", "prefix"),
            ("memory://?max_messages=5&max_messages=6", "max_messages"),
            ("redis://host:port", "port"),
            ("redis://host:99999", "port"),
            ("redis://%zz@host", "%"),
            ("kafka://", "host|kafka"),
        ],
    )
    def test_a_bad_url_is_refused_by_connect(self, url: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            connect(url)

    @pytest.mark.parametrize("url", [None, 5, b"memory://", ["memory://"]])
    def test_what_is_no_text_is_refused(self, url: Any) -> None:
        with pytest.raises(ConfigError):
            connect(url)

    @pytest.mark.parametrize(
        "options", [{"nonsense": 1}, {"max_messages": "many"}, {"session": -1}, {5: 5}, {"prefix": 5}]
    )
    def test_a_bad_option_is_refused_by_connect(self, options: Any) -> None:
        with pytest.raises(ConfigError):
            connect("memory://", options=options)

    def test_an_option_in_both_places_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="max_messages"):
            connect("memory://?max_messages=5", options={"max_messages": 6})

    @pytest.mark.parametrize("scheme", ["redis", "kafka"])
    def test_a_password_on_a_plaintext_connection_names_the_tls_form(self, scheme: str) -> None:
        with pytest.raises(
            InsecureCredentials, match={"redis": "rediss://", "kafka": r"kafka\+ssl://"}[scheme]
        ) as caught:
            connect(f"{scheme}://user:{CANARY}@broker.example/0")
        assert CANARY not in str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            f"redis://user:{CANARY}@broker.example:6379/0",
            f"redis://user:{CANARY}@broker.example:notaport/0",
            f"kafka://user:{CANARY}@b1,b2",
            f"kafka+ssl://user:{CANARY}@b1?nonsense=1",
            f"redsi://user:{CANARY}@broker.example",
            f"rediss://broker.example?password={CANARY}&nonsense=1",
        ],
    )
    def test_no_error_shows_a_password(self, url: str) -> None:
        with pytest.raises(ConfigError) as caught:
            connect(url)
        error: BaseException | None = caught.value
        while error is not None:
            assert CANARY not in f"{error!r} {error}"
            error = error.__cause__ or error.__context__

    @pytest.mark.parametrize("middleware", [5, None, print, [5], ["timeout"], [print, None]])
    def test_what_is_no_middleware_is_refused_by_connect(self, middleware: Any) -> None:
        with pytest.raises(ConfigError, match="middleware"):
            connect("memory://", middleware=middleware)

    def test_what_cannot_hear_events_is_refused_by_connect(self) -> None:
        async def nobody_awaits(event: object) -> None: ...

        for listener in (5, [print], nobody_awaits):
            with pytest.raises(ConfigError, match="on_event"):
                connect("memory://", on_event=listener)  # type: ignore[arg-type]

    def test_no_repr_shows_a_secret(self) -> None:
        broker = connect("memory://name", on_event=None)
        assert "name" in repr(broker)
        assert CANARY not in repr(broker)


class TestAddresses:
    @pytest.mark.parametrize(
        "options",
        [
            {"partitions": 0},
            {"partitions": 1.5},
            {"partitions": True},
            {"partitions": 10**9},
            {"retention": 0},
            {"retention": -1},
            {"retention": math.nan},
            {"retention": "7d"},
        ],
    )
    def test_a_topics_settings_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            Topic("orders", str, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"priorities": 0},
            {"priorities": 11},
            {"dedup": -1},
            {"dedup": math.inf},
            {"lease": 0},
            {"lease": 10**9},
            {"lease": None},
            {"reply": str, "dedup": 5},
            {"reply_codec": object()},
        ],
    )
    def test_a_queues_settings_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            Queue("emails", str, **options)

    def test_a_value_for_a_type_is_refused(self) -> None:
        for value in ("str", 5, [str], {"a": str}, (str,)):
            with pytest.raises(ConfigError, match="type"):
                Topic("orders", value)  # type: ignore[call-overload]

    def test_names_that_brokerkit_derives_are_not_for_users(self) -> None:
        for name in (internal("emails", "dead"), internal("bk", "reply"), "emails..dead", "bk"):
            with pytest.raises(InvalidName):
                Queue(name, str)

    def test_a_long_name_is_not_printed_in_full(self) -> None:
        with pytest.raises(InvalidName) as caught:
            Topic("x" * 100_000, str)
        assert len(str(caught.value)) < 400

    def test_addresses_are_frozen_and_not_pickled(self) -> None:
        topic: Any = Topic("orders", str)
        with pytest.raises(AttributeError):
            topic.name = "other"
        with pytest.raises(AttributeError):
            del topic.name
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(topic)


class TestPolicies:
    @pytest.mark.parametrize(
        "options",
        [
            {"attempts": 0},
            {"attempts": 1.5},
            {"attempts": True},
            {"wait_initial": -1},
            {"wait_initial": math.nan},
            {"wait_max": -1},
            {"wait_jitter": 1.1},
            {"wait_jitter": -0.1},
            {"on": ValueError()},
            {"on": ()},
            {"on": KeyboardInterrupt},
            {"on": "ValueError"},
        ],
    )
    def test_a_retry_policy_is_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            RetryPolicy(**options)

    @pytest.mark.parametrize("options", [{"max": 0}, {"max": 1.5}, {"max": 5, "wait": -1}, {"max": 5, "wait": 10**9}])
    def test_a_batch_is_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            Batch(**options)

    @pytest.mark.parametrize("when", [datetime(2030, 1, 1), "2030-01-01", 0, None])
    def test_a_start_in_time_is_an_aware_datetime(self, when: Any) -> None:
        with pytest.raises(ConfigError, match="time zone"):
            Start.at(when)

    @pytest.mark.parametrize("position", ["", 5, None, b"1"])
    def test_a_start_position_is_a_text(self, position: Any) -> None:
        with pytest.raises(ConfigError):
            Start.position(position)


class TestServices:
    def test_a_lifespan_that_was_called_is_refused(self) -> None:
        @asynccontextmanager
        async def resources() -> AsyncGenerator[int]:
            yield 1

        called: Any = resources()
        with pytest.raises(ConfigError, match="without calling it"):
            Service("billing", lifespan=called)

    def test_a_lifespan_without_its_decorator_is_refused(self) -> None:
        async def resources() -> AsyncGenerator[int]:
            yield 1

        bare: Any = resources
        with pytest.raises(ConfigError, match="@asynccontextmanager"):
            Service("billing", lifespan=bare)

    def test_a_url_is_no_broker_to_run_on(self) -> None:
        url: Any = f"memory://{CANARY}"
        with pytest.raises(ConfigError, match="not on a str"):
            Service("billing").running(url)
