"""The harness of real Kafka brokers: one for all processes of a run, with a network of its own before each of a test's brokers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from brokerkit.address import AnyTopic
from brokerkit.broker import Broker, connect
from brokerkit.driver import Capabilities
from brokerkit.drivers.kafka import KafkaDriver
from brokerkit.testing.conformance import Harness, Kind
from tests.servers.kafka import PREFIX, Endpoints, KafkaCluster, Network, Version, rights, shared_kafka

SLOW: Final = float(os.environ.get("BROKERKIT_PATIENCE", "1"))
"""How much longer than usual everything takes on a machine that has other things to do, too."""


class KafkaHarness(Harness):
    """Real time.  The broker lets the user of the tests do what README lists, and nothing else."""

    column = "kafka 4.3"
    prompt = True
    version: ClassVar[Version] = "4.3.1"
    lease = 1.0 * SLOW
    session = 2.0 * SLOW
    quiet = 0.5 * SLOW
    retention = 2.0 * SLOW
    dots = False  # Kafka refuses the second
    deadline = 20.0 * SLOW
    topics: ClassVar[Capabilities | None] = Capabilities(backend="kafka", durable=True, replay=True, key_order=True)
    queues = Capabilities(backend="kafka", durable=True, delay=True, ttl=True, shared=True, migrate=True)

    def crowd(self, kind: Kind, wanted: int) -> int:
        return min(super().crowd(kind, wanted), 12)  # each has connections, tasks and a membership of its own

    def options(self) -> Mapping[str, object]:
        return {**super().options(), "queue_partitions": self.consumers or 2}

    def __init__(self) -> None:
        super().__init__()
        self.networks: dict[Broker, Network] = {}
        self.cluster: KafkaCluster | None = None
        """Of this test alone."""
        self.endpoints: Endpoints
        self.prefix = f"{PREFIX}{secrets.token_hex(4)}."

    async def open(self) -> str:
        if self.alone:
            self.cluster = KafkaCluster(self.version, rights=True)
            self.cluster.start()
            self.endpoints = self.cluster.endpoints
            with self.endpoints.wire() as admin:
                admin.coordinator("group")
                admin.allow(rights(PREFIX))
        else:
            self.endpoints = shared_kafka(self.version, rights=True)
        return self.endpoints.url("SASL", query=f"session={1.5 * SLOW}")

    async def close(self) -> None:
        for network in self.networks.values():
            network.close()
        if self.cluster is not None:
            self.cluster.stop()
        else:
            with self.endpoints.wire() as admin:
                admin.delete([name for name in admin.cluster(None).topics if name.startswith(self.prefix)])
        assert not any(network.replies for network in self.networks.values()), "a reply was to be lost, and none was"

    def connect(self, **options: Any) -> Broker:
        network = Network(self.endpoints, "SASL")
        network.accept()
        options.setdefault("on_event", self.events.append)
        given: dict[str, Any] = {**self.options(), **options.get("options", {})}
        given["prefix"] = self.prefix + given.get("prefix", "")
        options["options"] = given
        try:
            broker = connect(network.url(query=self.url.partition("?")[2]), **options)
        except BaseException:
            network.close()
            raise
        self.networks[broker] = network
        return broker

    another = connect

    async def crash(self, broker: Broker) -> None:
        self.networks[broker].kill()
        # What is left of it in this process is told at once, and need not find out in seconds that nobody answers.
        hosted = self.opened(broker)._hosted
        assert hosted is not None
        assert hosted.task is not None
        hosted.task.cancel()

    def opened(self, broker: Broker) -> KafkaDriver:
        driver = self.driver(broker)
        assert isinstance(driver, KafkaDriver)
        return driver

    async def freeze(self, broker: Broker) -> None:
        self.networks[broker].freeze()

    async def thaw(self, broker: Broker) -> None:
        self.networks[broker].thaw()

    async def disconnect(self, broker: Broker) -> None:
        self.networks[broker].disconnect()
        # Here it takes a moment until that is noticed, and what is sent meanwhile is of unknown outcome.
        context = self.opened(broker)._context
        if context is not None:
            await self.eventually(lambda: not context.cluster.connected)

    async def reconnect(self, broker: Broker) -> None:
        self.networks[broker].accept()

    async def lose_replies(self, broker: Broker, count: int = 1) -> None:
        self.networks[broker].lose_replies(count)

    async def expire(self, broker: Broker, topic: AnyTopic) -> None:
        name = topic.name if topic.name.startswith(self.prefix) else self.prefix + topic.name
        with self.endpoints.wire() as admin:

            def gone() -> bool:
                return admin.offsets(name, end=False) == admin.offsets(name, end=True)

            await self.eventually(gone, f"{name} keeps what it has")

    async def restart(self) -> None:
        assert self.cluster is not None, "the test is not marked with @restarts"
        self.cluster.restart()


class OldestSharingHarness(KafkaHarness):
    """The oldest brokers whose share groups are used, for the part about queues: topics are not others there."""

    column = "kafka 4.2"
    version = "4.2.1"
    topics = None


class OldKafkaHarness(KafkaHarness):
    """Brokers without share groups."""

    column = "kafka 3.9"
    prompt = False
    version = "3.9.2"
    lease = 1.5 * SLOW  # a session: that is how long a process that has died owns what it had
    consumers = 4
    queues = Capabilities(backend="kafka", durable=True, delay=True, ttl=True)
