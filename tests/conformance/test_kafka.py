"""The conformance suite on a real Kafka 4.3, where share groups serve queues."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .kafka_harness import KafkaHarness

globals().update(suite(KafkaHarness))
