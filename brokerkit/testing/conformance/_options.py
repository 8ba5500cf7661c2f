"""The option table: every option of publishing, subscribing and addresses, with a column for each kind of address."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from ...address import Queue, Topic
from ...broker import Broker
from ...errors import CapabilityError, ConfigError
from ...message import Message
from ...service import Service
from ._harness import Harness, Kind


@dataclass(frozen=True)
class Option:
    """Where an option works.  False: it is refused; a text: it works where that capability is claimed."""

    topic: bool | str
    queue: bool | str

    def on(self, kind: Kind) -> bool | str:
        return self.topic if kind == "topic" else self.queue


BOTH = Option(topic=True, queue=True)
TOPIC = Option(topic=True, queue=False)
QUEUE = Option(topic=False, queue=True)

OPTIONS: dict[str, Option] = {
    "publish.key": TOPIC,
    "publish.id": BOTH,
    "publish.headers": BOTH,
    "publish.delay": Option(topic=False, queue="delay"),
    "publish.ttl": Option(topic=False, queue="ttl"),
    "publish.priority": Option(topic=False, queue="priority"),
    "publish.timeout": BOTH,
    "subscribe.group": TOPIC,
    "subscribe.start": TOPIC,
    "subscribe.prefetch": BOTH,
    "subscribe.until_end": TOPIC,
    "subscribe.on_invalid": TOPIC,
    "subscribe.patient": BOTH,
    "service.group": TOPIC,
    "service.start": TOPIC,
    "service.concurrency": BOTH,
    "service.prefetch": BOTH,
    "service.retry": BOTH,
    "service.max_deliveries": BOTH,
    "service.timeout": BOTH,
    "service.batch": BOTH,
    "address.partitions": TOPIC,
    "address.retention": TOPIC,
    "address.priorities": Option(topic=False, queue="priority"),
    "address.dedup": Option(topic=False, queue="dedup"),
    "address.lease": QUEUE,
    "address.codec": BOTH,
    "address.owned": BOTH,
    "address.reply": QUEUE,
    "address.reply_codec": QUEUE,
}

REFUSALS = (ConfigError, TypeError, ValueError)
"""What misuse may raise that a type checker sees first."""


def signatures() -> set[str]:
    """Return every option that there is, by the names of the table."""
    return {
        f"{name}.{option}"
        for name, several in (
            ("publish", [(Broker, "publish")]),
            ("subscribe", [(Broker, "subscribe")]),
            ("service", [(Service, "subscribe")]),
            ("address", [(Topic, "__init__"), (Queue, "__init__")]),
        )
        for option in _keywords(*several)
    }


def staged() -> set[str]:
    """Return the options of `Message.publish`, which are those of ``outgoing`` too."""
    options = _keywords((Message, "publish"))
    assert options == _keywords((Topic, "outgoing"), (Queue, "outgoing")), "outgoing and Message.publish differ"
    return {f"publish.{name}" for name in options}


def _keywords(*functions: tuple[object, str]) -> set[str]:
    return {
        name
        for owner, function in functions
        for name, each in inspect.signature(getattr(owner, function)).parameters.items()
        if each.kind is each.KEYWORD_ONLY
    }


def works(system: Harness, option: str, kind: Kind) -> type[Exception] | tuple[type[Exception], ...] | None:
    """Return None where *option* works, else what using it must raise."""
    cell = OPTIONS[option].on(kind)
    if cell is False:
        return REFUSALS
    claim = system.topics if kind == "topic" else system.queues
    return None if cell is True or getattr(claim, cell) else CapabilityError
