"""What is measured on ``memory://``: publish -> typed handler -> ack in one process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .bare import Bare
from .frame import Backend, Goal, Row, Work
from .job import RATE
from .ours import Brokerkit
from .peers import FastStream, Taskiq

MEMORY = Backend(name="memory", serve=lambda: contextlib.nullcontext("memory://"))


@dataclass(frozen=True)
class _Shape:
    keyed: bool
    handlers: int
    batch: int

    def work(self, peers: Sequence[type[Row]]) -> Work:
        kind = "topic" if self.keyed else "queue"
        many = self.batch > 1
        return Work(
            name=f"{kind}-{self.handlers}" + ("-many" if many else ""),
            title=(
                f"{'topic, keyed' if self.keyed else 'queue'}, published "
                f"{f'{self.batch} at a time' if many else 'one by one'}, "
                f"{self.handlers} handler{'s at once' if self.handlers > 1 else ''}"
            ),
            backend="memory",
            handlers=self.handlers,
            keyed=self.keyed,
            batch=self.batch,
            most=200_000,
            goals=(
                Goal(row="brokerkit", than="bare", factor=0.3),
                *(Goal(row="brokerkit", than=peer.name, factor=5) for peer in peers),
            ),
        )


def plan() -> list[tuple[Work, Sequence[type[Row]]]]:
    """Return what is measured on memory."""
    made: list[tuple[Work, Sequence[type[Row]]]] = []
    for keyed, batch, handlers in itertools.product((False, True), (1, 100), (1, 100)):
        peers: list[type[Row]] = [FastStream, Taskiq]
        if batch > 1:
            peers = [] if keyed else [FastStream]
        made.append((_Shape(keyed, handlers, batch).work(peers), (Bare, Brokerkit, *peers)))
    overlapping = Work(
        name="queue-100-overlapping",
        title="queue, published one by one, 100 handlers that each give the loop back once",
        backend="memory",
        handlers=100,
        yields=True,
    )
    latency = Work(
        name="queue-latency",
        title=f"queue, {RATE} messages a second: from publish to handler",
        backend="memory",
        metric="latency",
        handlers=100,
    )
    return [*made, (overlapping, (Bare, Brokerkit, FastStream, Taskiq)), (latency, (Bare, Brokerkit))]
