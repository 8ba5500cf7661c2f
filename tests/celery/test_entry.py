"""What Kombu's import gives every process: our transport's names, a serializer, and nothing that costs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import _brokerkit_kombu as entry
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads
from kombu.transport import TRANSPORT_ALIASES

ROOT = Path(__file__).parents[2]
OURS = "brokerkit.celery.transport:Transport"
NAMED = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from celery import Celery
    app = Celery("names", broker="amqp://nowhere")
    app.amqp, app.tasks
from kombu.transport import TRANSPORT_ALIASES
names = {name: value() if callable(value) else value for name, value in TRANSPORT_ALIASES.items()}
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"names": names, "loaded": loaded, "told": [str(one.message) for one in told]}))
"""


def process(code: str, **environment: str) -> Any:
    """Return what a new process prints that runs *code*."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BROKERKIT")} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(names: dict[str, str]) -> set[str]:
    return {name for name, path in names.items() if path == OURS and not name.startswith("brokerkit")}


def test_what_is_installed_is_this_file() -> None:
    here = ROOT / "brokerkit" / "_kombu.py"
    assert Path(str(entry.__file__)).read_text(encoding="utf-8") == here.read_text(encoding="utf-8"), (
        "install the project again: pip install --editable ."
    )


def test_the_entry_point_is_found() -> None:
    (found,) = (point for point in entry_points(group="kombu.serializers") if point.name == "orjson")
    assert found.load() is entry.serializer


class TestNames:
    def test_kafka_is_ours_in_every_process_and_the_rest_celerys(self) -> None:
        names = process(NAMED)["names"]
        assert ours(names) == {"kafka", "kafka+ssl"}
        assert names["confluentkafka"] == "kombu.transport.confluentkafka:Transport"
        assert names["redis"] == names["rediss"] == "kombu.transport.redis:Transport"
        assert names["memory"] == "kombu.transport.memory:Transport"

    def test_ours_have_names_of_their_own_always(self) -> None:
        names = process(NAMED, BROKERKIT_CELERY_TAKEOVER="")["names"]
        mine = {name for name, path in names.items() if path == OURS}
        assert mine == {
            "brokerkit", "brokerkit+memory", "brokerkit+redis", "brokerkit+rediss", "brokerkit+redis+unix",
            "brokerkit+redis+socket", "brokerkit+kafka", "brokerkit+kafka+ssl",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("wanted", "taken"),
        [
            ("", set()),
            (" ", set()),
            ("kafka", {"kafka", "kafka+ssl"}),
            ("kafka,redis", {"kafka", "kafka+ssl", "redis", "redis+unix", "redis+socket"}),
            (" redis:// , rediss ", {"redis", "redis+unix", "redis+socket", "rediss"}),
            ("memory,confluentkafka", {"memory", "confluentkafka"}),
        ],
    )
    def test_a_variable_says_what_is_taken_over(self, wanted: str, taken: set[str]) -> None:
        answer = process(NAMED, BROKERKIT_CELERY_TAKEOVER=wanted)
        assert ours(answer["names"]) == taken
        assert answer["told"] == []

    def test_what_cannot_be_taken_over_is_named(self) -> None:
        answer = process(NAMED, BROKERKIT_CELERY_TAKEOVER="kafak,memory")
        (told,) = answer["told"]
        assert "'kafak'" in told
        assert ours(answer["names"]) == {"memory"}

    @pytest.mark.parametrize(
        ("installed", "serves"),
        [
            ({"kio", "confluent_kafka"}, OURS),
            ({"kio"}, OURS),
            (set(), OURS),  # and says what to install
            ({"confluent_kafka"}, "kombu.transport.confluentkafka:Transport"),
        ],
    )
    def test_celerys_own_serves_kafka_only_where_ours_cannot(
        self, installed: set[str], serves: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(entry, "find_spec", lambda name: object() if name in installed else None)
        assert entry._kafka() == serves

    def test_a_transport_that_was_resolved_before_gives_way(self) -> None:
        code = """
        import json
        from kombu.transport import _transport_cache, get_transport_cls
        _transport_cache["kafka"] = object
        from celery import Celery
        app = Celery("myapp", broker="kafka://localhost:9092")
        print(json.dumps(type(app.connection().transport).__module__))
        """
        assert process(textwrap.dedent(code)) == "brokerkit.celery.transport"

    def test_a_program_of_kombus_alone_imports_us_first(self) -> None:
        code = """
        import json
        import brokerkit.celery
        from kombu import Connection
        print(json.dumps(type(Connection("kafka://localhost:9092").transport).__module__))
        """
        assert process(textwrap.dedent(code)) == "brokerkit.celery.transport"

    def test_kafka_works_without_the_client_that_celery_wants(self) -> None:
        code = """
        import json, sys
        sys.modules["confluent_kafka"] = None
        from celery import Celery
        app = Celery("myapp", broker="kafka://localhost:9092")
        print(json.dumps(type(app.connection().transport).__module__))
        """
        assert process(textwrap.dedent(code)) == "brokerkit.celery.transport"

    def test_the_command_line_knows_the_pool_of_async_tasks(self) -> None:
        code = "import json; from celery.bin.celery import celery; from celery.concurrency import get_available_pool_names as n"
        assert "brokerkit" in process(f"{code}; print(json.dumps(n()))")


class TestCost:
    def test_a_process_with_another_broker_loads_one_small_module(self) -> None:
        loaded = set(process(NAMED)["loaded"])
        assert "_brokerkit_kombu" in loaded
        assert not loaded & {"brokerkit", "anyio", "msgspec", "orjson", "aiokafka", "kio", "redis", "confluent_kafka"}

    def test_an_app_loads_nothing_that_only_a_worker_needs(self) -> None:
        code = """
        import json, sys
        from brokerkit.celery import Celery
        app = Celery("cost", broker="kafka://localhost:9092")
        app.connection().transport
        print(json.dumps(sorted(sys.modules)))
        """
        loaded = set(process(textwrap.dedent(code)))
        assert not loaded & {"celery.apps.worker", "celery.bin", "celery.concurrency.base", "celery.worker.consumer"}
        assert not {name.partition(".")[0] for name in loaded} & {"pytest", "confluent_kafka", "uvloop"}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=8,
)


def both(value: object) -> tuple[object, object]:
    """Return *value* after a journey by our serializer, and by Kombu's ``json``."""

    def journey(serializer: str) -> object:
        kind, encoding, body = dumps(value, serializer=serializer)
        assert loads(body if isinstance(body, str) else body.decode(), kind, encoding, accept={kind}) == loads(
            body, kind, encoding, accept={kind}
        )
        return loads(body, kind, encoding, accept={kind})

    return journey("orjson"), journey("json")


class TestSerializer:
    @given(plain)
    def test_what_json_carries_arrives(self, value: object) -> None:
        mine, theirs = both(value)
        assert mine == theirs
        assert repr(mine) == repr(theirs)

    @pytest.mark.parametrize(
        "value",
        [
            datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
            date(2026, 1, 2),
            time(3, 4),
            Decimal("1.50"),
            b"text",
            b"\xff\x00",
            2**80,
            [2**64 + 1, -(2**63) - 1, 2**64 - 1, -(2**63)],
            {1: "a", None: "b", 2.5: "c"},
            (1, (2, 3)),
            "\ud800",
            {"__type__": "datetime", "__value__": "2026-01-02T03:04:05"},
            {"a": {"b": [Decimal(1), {"c": datetime(2026, 1, 2, tzinfo=UTC)}]}},
            [[5, 10], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}],
        ],
        ids=repr,
    )
    def test_values_of_pythons_are_those_of_celerys_json(self, value: object) -> None:
        mine, theirs = both(value)
        assert mine == theirs
        assert repr(mine) == repr(theirs)

    def test_a_uuid_is_a_text_and_nan_is_none(self) -> None:
        known = uuid.UUID(int=5)
        assert both(known)[0] == str(known)
        assert both([float("nan")])[0] == [None]

    def test_what_nobody_can_write_is_refused(self) -> None:
        with pytest.raises(Exception, match="not JSON serializable"):
            dumps(object(), serializer="orjson")

    @pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1,]"])
    def test_what_nobody_can_read_is_refused_as_it_is_by_json(self, body: bytes) -> None:
        def outcome(kind: str) -> object:
            try:
                return loads(body, kind, "utf-8", accept={kind})
            except Exception as error:
                return type(error)

        assert outcome("application/x-orjson") == outcome("application/json")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """No test here changes the names of this process."""
    before = dict(TRANSPORT_ALIASES)
    yield
    assert before == TRANSPORT_ALIASES
    importlib.invalidate_caches()
