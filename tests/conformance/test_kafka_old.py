"""The conformance suite on a real Kafka 3.9, where classic groups serve queues."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .kafka_harness import OldKafkaHarness

globals().update(suite(OldKafkaHarness))
