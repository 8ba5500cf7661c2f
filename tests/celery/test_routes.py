"""Where messages go by exchanges, and what happens to those that go nowhere, as Kombu and Celery see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue

from .channels import SYSTEMS, Place, placed
from .reader import Reader


@pytest.fixture(params=SYSTEMS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with placed(request.param) as made:
        yield made


def connect(place: Place, process: int = 0) -> Any:
    """Return a connection; with another *process* it shares nothing, as other options are another bridge."""
    options = {"prefix": place.prefix, "eta_window": 60 - process}
    return Connection(f"brokerkit+{place.url}", transport_options=options)


def test_a_queue_that_another_process_deletes_is_bound_when_it_is_declared_again(place: Place) -> None:
    """Else what is published to its exchange goes nowhere, for as long as the connection lasts."""
    queue = Queue("shared", Exchange("news", "topic"), routing_key="a.#")
    with connect(place) as one, connect(place, 1) as other:
        channel = one.channel()
        queue(channel).declare()
        for n in range(2):
            queue(other.channel()).delete()
            assert queue(channel).queue_declare() == ("shared", 0, 0)  # it exists again
            queue(channel).declare()
            Producer(channel).publish(n, exchange=queue.exchange, routing_key="a.b")
            reader = Reader(other, queue)
            assert [message.payload for message in reader.read(1)] == [n]
            reader.channel.close()
