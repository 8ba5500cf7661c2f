"""What the conformance suite says about queues, on a real Kafka 4.2."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .kafka_harness import OldestSharingHarness

globals().update(suite(OldestSharingHarness))
