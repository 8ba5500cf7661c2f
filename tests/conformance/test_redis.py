"""The conformance suite on a real Redis 7."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .redis_harness import RedisHarness

globals().update(suite(RedisHarness))
