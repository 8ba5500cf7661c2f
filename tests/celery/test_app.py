"""`brokerkit.celery.Celery`: Celery's app, with brokerkit's URLs."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import celery
import pytest
from celery.app.utils import bugreport
from celery.contrib.testing.worker import start_worker

from brokerkit.celery import Celery, _url

CANARY = "canary-9f3b"


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """Let the root logger be as it was: a worker of Celery's for tests sets it."""
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Return what makes apps that are closed in the end."""
    made: list[Any] = []

    def make(*arguments: Any, kind: Any = Celery, **options: Any) -> Any:
        app = kind(*arguments, set_as_current=False, **options)
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()


def goes(connection: Any) -> str:
    with connection:
        assert type(connection.transport).__module__ == "brokerkit.celery.transport"
        return _url.target(connection).url


class TestUrls:
    @pytest.mark.parametrize(
        ("broker", "there"),
        [
            ("kafka://localhost:9092", "kafka://localhost:9092"),
            ("kafka://h1:9092,h2:9092?queue_partitions=2", "kafka://h1:9092,h2:9092"),
            ("kafka://h1:9092;kafka://h2:9092", "kafka://h1:9092,h2:9092"),
            (["kafka://h1:9092", "kafka://h2:9092"], "kafka://h1:9092,h2:9092"),
            ("kafka+ssl://h", "kafka+ssl://h"),
            ("redis://localhost:6379/1", "redis://localhost:6379/1"),
            ("redis://localhost?timeout=3", "redis://localhost"),
            ("rediss://localhost", "rediss://localhost"),
            ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
            ("redis+socket:///run/redis.sock?virtual_host=3", "redis+unix:///run/redis.sock"),
            ("memory://", "memory://celery"),
            ("brokerkit+redis://localhost", "redis://localhost"),
        ],
    )
    def test_every_url_that_brokerkit_has_is_brokerkits(self, make: Any, broker: Any, there: str) -> None:
        app = make("x", broker=broker)
        assert goes(app.connection_for_read()) == goes(app.connection_for_write()) == goes(app.connection()) == there
        assert app.conf.broker_url == broker  # as it was written
        assert goes(app.connection_for_read(broker)) == there
        assert goes(app.connection_for_read().clone()) == there

    def test_reading_and_writing_may_be_elsewhere(self, make: Any) -> None:
        app = make("x", broker="kafka://h")
        app.conf.update(broker_read_url="redis://reads", broker_write_url="memory://writes")
        assert goes(app.connection_for_read()) == "redis://reads"
        assert goes(app.connection_for_write()) == "memory://writes"

    def test_a_variable_may_say_where(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELERY_BROKER_URL", "redis://there/3")
        assert goes(make("x").connection_for_write()) == "redis://there/3"

    def test_other_urls_are_celerys(self, make: Any) -> None:
        with make("x", broker="amqp://h").connection() as connection:
            assert connection.transport_cls == "amqp"

    def test_options_of_the_transport_are_passed(self, make: Any) -> None:
        app = make("x", broker="redis://h", broker_transport_options={"prefix": "a.", "lease": 20})
        found = _url.target(app.connection_for_write())
        assert dict(found.options)["prefix"] == "a."
        assert dict(found.own) == {"lease": 20.0}


class TestSettings:
    def test_what_celery_shows_shows_several_hosts_and_no_password(self, make: Any) -> None:
        app = make("x", broker=f"kafka://u:{CANARY}@h1:9092,h2:9092?queue_partitions=2")
        app.conf.broker_read_url = [f"redis://:{CANARY}@h1/0", f"redis://:{CANARY}@h2/1"]
        app.conf.broker_transport_options = {"password_file": "key", "password": CANARY}
        table = app.conf.table()
        assert table["broker_url"] == "kafka://u:***@h1:9092,h2:9092?queue_partitions=2"
        assert table["broker_read_url"] == ["redis://:***@h1/0", "redis://:***@h2/1"]
        for text in (repr(table), bugreport(app), app.conf.humanize(with_defaults=True)):
            assert CANARY not in text
            assert "h1" in text
        assert app.conf.table(censored=False)["broker_url"] == app.conf.broker_url

    def test_a_source_of_settings_is_read_as_celery_reads_it(self, make: Any) -> None:
        app = make("x")
        app.config_from_object(
            SimpleNamespace(CELERY_BROKER_URL=f"redis://:{CANARY}@h/1", CELERY_TASK_DEFAULT_QUEUE="q"),
            namespace="CELERY",
        )
        assert goes(app.connection_for_write()) == "redis://h/1"
        assert app.conf.task_default_queue == "q"
        assert CANARY not in repr(app.conf.table())

    def test_settings_of_another_class_are_left_alone(self, make: Any) -> None:
        app = make("x", broker="memory://", kind=celery.Celery)
        assert type(app.conf).__module__ == "celery.app.utils"

    def test_a_copy_of_the_settings_masks_too(self, make: Any) -> None:
        app = make("x", broker=f"kafka://u:{CANARY}@h1,h2")
        assert CANARY not in repr(app.conf.copy().table())

    def test_an_app_is_pickled_and_comes_back(self, make: Any) -> None:
        app = make("x", broker="kafka://h1:9092,h2:9092")
        again = pickle.loads(pickle.dumps(app))
        assert type(again) is Celery
        assert goes(again.connection_for_write()) == "kafka://h1:9092,h2:9092"


class TestTasks:
    @pytest.mark.parametrize("kind", [Celery, celery.Celery], ids=["brokerkit", "celery"])
    @pytest.mark.filterwarnings("ignore:.*superuser")
    def test_a_task_is_published_and_done(self, make: Any, kind: Any) -> None:
        broker = "memory://app" if kind is Celery else "brokerkit+memory://app"
        app = make("x", broker=broker, backend="cache+memory://", kind=kind)

        @app.task(shared=False)
        def add(x: int, y: int) -> int:
            return x + y

        @app.task(name="named", bind=True, shared=False)
        def named(self: Any, x: int) -> list[object]:
            return [self.request.delivery_info["routing_key"], x]

        with start_worker(app, pool="solo", perform_ping_check=False):
            assert add.delay(5, 10).get(timeout=10) == 15
            assert named.delay(3).get(timeout=10) == ["celery", 3]
            assert app.send_task(named.name, (4,)).get(timeout=10) == ["celery", 4]

    def test_a_task_may_be_a_coroutine(self, make: Any) -> None:
        app = make("x", broker="memory://")

        @app.task
        async def coroutine(x: int, y: int) -> int:
            return x + y

        assert coroutine.apply((2, 3)).get() == 5

    def test_closing_an_app_twice_is_nothing(self, make: Any) -> None:
        app = make("x", broker="memory://")
        app.close()
        app.close()
