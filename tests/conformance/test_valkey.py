"""The conformance suite on a real Valkey 9."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .redis_harness import ValkeyHarness

globals().update(suite(ValkeyHarness))
