"""The conformance suite on the memory driver, in virtual time."""

from __future__ import annotations

from brokerkit.testing.conformance import suite

from .harness import MemoryHarness

globals().update(suite(MemoryHarness))
