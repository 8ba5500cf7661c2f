"""Says once, when a worker is ready, that tasks wait where Celery's own Kafka transport has put them.

Its queue is the topic of that name, ours is not: what is there is run by workers of the old fleet only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final, cast

from celery import signals as _signals

from ..address import Topic
from ..broker import Broker
from ..errors import BrokerError, InvalidName, NotFound
from ._bridge import bridge_of

logger = logging.getLogger("brokerkit.celery")

PATIENCE: Final = 5.0
"""Seconds after which the worker goes on without an answer."""

signals: Any = _signals


def watch() -> None:
    """Have every worker of this process look when it is ready."""
    signals.worker_ready.connect(_ready, weak=False, dispatch_uid="brokerkit: tasks of another transport")


def _ready(sender: Any = None, **_: object) -> None:
    bridge = bridge_of(sender)
    if bridge is None or bridge.system != "kafka":
        return
    try:
        queues = list(sender.app.amqp.queues.consume_from)
        found = bridge.call(unread, bridge.broker, queues, timeout=PATIENCE)
    except BrokerError as error:
        logger.debug("cannot tell whether another transport has left tasks: %s", error)
        return
    if found:
        logger.warning(
            "tasks that Celery's own Kafka transport has published are unread in the topics %s: brokerkit's queues are "
            "elsewhere, so run a worker of the old fleet (BROKERKIT_CELERY_TAKEOVER= and confluent-kafka) until none is left",
            ", ".join(f"{name} ({number})" for name, number in found.items()),
        )


async def unread(broker: Broker, queues: Iterable[str]) -> dict[str, int]:
    """Return how many messages Celery's own transport has left in each of *queues*, where it has left any.

    Raises:
        BrokerError: they cannot be asked for.
    """
    from ..drivers.kafka import KafkaDriver

    found: dict[str, int] = {}
    driver = broker._driver
    assert isinstance(driver, KafkaDriver)
    for queue in queues:
        name = queue.replace("@", "")  # as it does
        try:
            topic = (await broker.bind(Topic(name, bytes, owned=False))).address
            waiting = await driver.foreign_backlog(cast("Topic[bytes]", topic), f"{name}-consumer-group", PATIENCE)
        except (InvalidName, NotFound):  # a name that is none of a topic's here is of a queue that is not there
            continue
        if waiting:
            found[name] = waiting
    return found
