"""The conformance suite on a real Kafka 3.9: what it says about topics."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .kafka_harness import OldKafkaHarness

globals().update(suite(OldKafkaHarness))
