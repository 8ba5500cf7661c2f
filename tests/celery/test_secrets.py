"""No password is in anything that Celery shows, prints or raises, and what is wrong with a broker's URL is said in one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from celery.app.utils import bugreport

import brokerkit.celery
from brokerkit import AuthenticationError, BrokerError, ConfigError, InsecureCredentials
from brokerkit.celery import _options, _url
from brokerkit.drivers._url import Secret

from ..servers.access import ADMIN, USER
from ..servers.kafka import shared_kafka
from ..servers.ports import free_port
from .systems import System, forget
from .workers import PATIENCE

CANARY = "canary-9f3b"
APPS = [brokerkit.celery.Celery, celery.Celery]
PROGRAM = """
import os
from celery import Celery

app = Celery("shown", broker=os.environ["BROKER"].split(" ") if " " in os.environ["BROKER"] else os.environ["BROKER"])
app.conf.update(
    broker_transport_options=eval(os.environ.get("OPTIONS", "{}")),
    broker_use_ssl=eval(os.environ.get("TLS", "False")),
    broker_connection_retry_on_startup=bool(os.environ.get("RETRY")),
    worker_hijack_root_logger=True,
)

@app.task
def add(x, y):
    return x + y
"""


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_options, "_told", set())
    yield


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "shown.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "celery", "-A", "shown", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"PYTHONPATH": str(folder), "KOMBU_LOG_CONNECTION": "1", "KOMBU_LOG_CHANNEL": "1"} | environment
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def output(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Return the exit code and all that a command of Celery's prints."""
    process = start(folder, *arguments, **environment)
    try:
        text, _ = process.communicate(timeout=30 * PATIENCE)
    finally:
        process.kill()
    return process.returncode, text


def until(words: str, lines: Iterable[str]) -> str:
    """Return the lines up to the one with *words*, or all that are left."""
    read: list[str] = []
    for line in lines:
        read.append(line)
        if words and words in line:
            break
    return "".join(read)


FORMS: list[tuple[list[Any], Any]] = [
    (APPS, f"kafka://u:{CANARY}@h:9092"),
    (APPS, f"kafka+ssl://u:{CANARY}@h:9092"),
    (APPS, f"kafka://u:{CANARY}@h1:9092;kafka://u:{CANARY}@h2:9092"),
    (APPS, [f"kafka://u:{CANARY}@h1:9092", f"kafka://u:{CANARY}@h2:9092"]),
    (APPS, f"brokerkit+redis://:{CANARY}@h/0?timeout=3"),
    (APPS, f"brokerkit+redis://h/0?password={CANARY}"),
    (APPS, f"brokerkit+rediss://u:{CANARY}@h/0"),
    (APPS, f"brokerkit+redis://:{CANARY}@h1/0;brokerkit+redis://:{CANARY}@h2/0"),
    (APPS, f"brokerkit+kafka://u:{CANARY}@h1:9092,h2:9092"),
    (APPS[:1], f"kafka://u:{CANARY}@h1:9092,h2:9092"),
    (APPS[:1], f"redis://u:{CANARY}@h:6379/1"),
    (APPS[:1], f"redis://h?password={CANARY}"),
]


class TestShown:
    @pytest.mark.parametrize(
        ("kind", "broker"), [(kind, broker) for kinds, broker in FORMS for kind in kinds], ids=lambda value: str(value)
    )
    def test_no_text_of_an_app_or_a_connection_has_it(
        self, kind: Any, broker: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = kind("x", broker=broker, set_as_current=False)
        app.conf.broker_transport_options = {"password_file": "f"}
        with caplog.at_level(logging.DEBUG), app.connection_for_write() as connection:
            texts = [
                repr(connection),
                connection.as_uri(),
                connection.as_uri(mask="-"),
                repr(connection.clone()),
                repr(app.conf.table(with_defaults=True)),
                bugreport(app),
                app.conf.humanize(),
                repr(connection.transport),
                repr({name: value for name, value in connection.info().items() if name != "password"}),
                repr({name: value for name, value in connection.clone().info().items() if name != "password"}),
            ]
            assert connection.clone().password in {CANARY, None}
        for text in [*texts, caplog.text]:
            assert CANARY not in text, text

    def test_a_url_shown_with_its_password_leads_to_the_same_place(self) -> None:
        app = celery.Celery("x", broker=f"brokerkit+redis://u:{CANARY}@h:6379/1", set_as_current=False)
        with app.connection_for_write() as connection:
            shown = connection.as_uri(include_password=True)
            assert shown == f"brokerkit+redis://u:{CANARY}@h:6379/1"

    def test_an_option_is_not_told_either(self) -> None:
        options = {"password": CANARY, "prefix": "a."}
        app = celery.Celery("x", broker="brokerkit+redis://h", broker_transport_options=options, set_as_current=False)
        with app.connection_for_write() as connection:
            told = connection.info()
            assert told.pop("password") == CANARY
            assert CANARY not in repr(told)
            assert dict(_url.target(connection.clone()).options)["password"] == Secret(CANARY)
        assert app.conf.broker_transport_options == options

    def test_several_hosts_are_shown(self) -> None:
        app = celery.Celery("x", broker=f"brokerkit+kafka://u:{CANARY}@h1:9092,h2:9092", set_as_current=False)
        with app.connection_for_write() as connection:
            assert connection.as_uri() == "brokerkit+kafka://u:**@h1:9092,h2:9092"


class TestRefused:
    """A program that publishes."""

    @pytest.mark.parametrize(
        ("broker", "options", "error", "says"),
        [
            (f"kafka://u:{CANARY}@far:9092", {}, InsecureCredentials, r"kafka\+ssl://.*broker_transport_options"),
            (f"brokerkit+redis://:{CANARY}@far", {}, InsecureCredentials, r"rediss://.*broker_transport_options"),
            (f"kafka://u:{CANARY}@localhost:9092", {"sesion": 3}, ConfigError, "did you mean 'session'"),
            (f"brokerkit+redis://:{CANARY}@localhost/x", {}, ConfigError, "number of a database"),
            (f"kafka://:{CANARY}@localhost", {}, ConfigError, "user name"),
        ],
    )
    def test_a_senseless_url_or_option_is_one_clear_error(
        self, broker: str, options: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        app = celery.Celery("x", broker=broker, broker_transport_options=options, set_as_current=False)
        with pytest.raises(error, match=says) as refused:
            app.send_task("any", retry=False)
        assert "\n" not in str(refused.value)
        assert CANARY not in "".join(traceback.format_exception(refused.value))

    def test_an_absent_broker_is_named_without_it(self) -> None:
        for broker in (
            f"brokerkit+redis://:{CANARY}@localhost:{free_port()}",
            f"kafka+ssl://u:{CANARY}@localhost:{free_port()}",
        ):
            app = celery.Celery("x", broker=broker, set_as_current=False)
            with pytest.raises(Exception, match=r"connecting to .*localhost") as refused:
                app.send_task("any", retry=False)
            assert isinstance(refused.value, (celery.exceptions.OperationalError, BrokerError))
            assert CANARY not in "".join(traceback.format_exception(refused.value))

    def test_a_refused_password_is_said_at_once_and_not_shown(self, system: System) -> None:
        if system.name == "redis":
            broker = f"brokerkit+redis://{ADMIN}:{CANARY}@127.0.0.1:{system.results.port}"
        else:
            broker = shared_kafka().url("SASL", password=CANARY)
        app = celery.Celery("x", broker=broker, set_as_current=False)
        begin = time.monotonic()
        with pytest.raises(AuthenticationError, match=r"refused|uthenticat") as refused:
            app.send_task("any")
        assert time.monotonic() - begin < 10 * PATIENCE
        assert CANARY not in "".join(traceback.format_exception(refused.value))


class TestWorker:
    """The command ``celery``."""

    def test_a_refused_password_ends_a_worker_with_one_line_about_it(self, system: System, program: Path) -> None:
        if system.name == "redis":
            broker = f"brokerkit+redis://{ADMIN}:{CANARY}@127.0.0.1:{system.results.port}"
        else:
            broker = shared_kafka().url("SASL", password=CANARY)
        code, text = output(program, "worker", "-P", "solo", "--loglevel=debug", BROKER=broker, RETRY="1")
        assert code != 0
        (line,) = [line for line in text.splitlines() if "Unrecoverable error" in line]
        assert "AuthenticationError" in line
        assert CANARY not in text

    @pytest.mark.parametrize(
        ("broker", "options", "says"),
        [
            (f"kafka://u:{CANARY}@far:9092", "{}", "would travel in plain text to far:9092"),
            ("kafka://localhost:9092", "{'queue_partition': 3}", "did you mean 'queue_partitions'"),
            (f"brokerkit+rediss://:{CANARY}@localhost?tiemout=1", "{}", "did you mean 'timeout'"),
        ],
    )
    def test_a_senseless_setting_ends_a_worker_with_one_line_about_it(
        self, broker: str, options: str, says: str, program: Path
    ) -> None:
        code, text = output(
            program, "worker", "-P", "solo", "--loglevel=debug", BROKER=broker, OPTIONS=options, RETRY="1"
        )
        assert code != 0
        (line,) = [line for line in text.splitlines() if "Unrecoverable error" in line]
        assert says in line.replace("\\", "")
        assert CANARY not in text

    def test_an_absent_broker_ends_a_worker_that_is_not_to_wait(self, program: Path) -> None:
        broker = f"brokerkit+redis://:{CANARY}@localhost:{free_port()}"
        code, text = output(program, "worker", "-P", "solo", "--loglevel=debug", BROKER=broker)
        assert code != 0
        assert "broker_connection_retry_on_startup=False" in text  # Celery says no more
        assert CANARY not in text

    def test_nothing_that_a_working_one_says_has_the_password(
        self, system: System, program: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        options: dict[str, Any] = {}
        tls: object = False
        if system.name == "redis":
            broker, secret = f"brokerkit+{system.results.url(user=ADMIN)}", system.results.passwords[ADMIN]
        else:
            kafka = shared_kafka()
            options, tls = {"prefix": f"secrets{os.getpid()}."}, {"ca_certs": kafka.authority}
            broker, secret = kafka.url("SASLSSL"), kafka.passwords[USER]
        assert f":{secret}@" in broker
        app = celery.Celery("x", broker=broker, broker_use_ssl=tls, broker_transport_options=options)
        worker = start(program, "worker", "-P", "solo", "--loglevel=debug", "-n", "w@secrets",
                       BROKER=broker, OPTIONS=repr(options), TLS=repr(tls))  # fmt: skip
        said = ""
        try:
            assert worker.stdout is not None
            said += until("w@secrets ready", worker.stdout)
            with caplog.at_level(logging.DEBUG):
                asked = app.control.inspect(["w@secrets"], timeout=20 * PATIENCE, limit=1)
                told = [repr(asked.conf()), repr(asked.stats())]
                app.send_task("shown.add", (2, 3))
                said += until("succeeded", worker.stdout)
                worker.terminate()
            said += until("", worker.stdout)
        finally:
            worker.kill()
            worker.communicate()
            app.pool.force_close_all()
            app.close()
            if options:
                forget(shared_kafka(), options["prefix"])
        assert "'broker_url'" in told[0]
        assert "'transport'" in told[1]
        assert "Task shown.add" in said, said
        shown = "\n".join([*told, said, caplog.text])
        assert not [line for line in shown.splitlines() if secret in line]
