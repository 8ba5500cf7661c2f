"""The conformance suite: what every driver must do, as tests named as sentences.

A driver's author writes a `Harness` (how to reach an empty system, how to kill a connection) and one test file::

    from brokerkit.testing.conformance import suite
    from .harness import RedisHarness

    globals().update(suite(RedisHarness))

pytest collects the classes that `suite` returns; no plugin for asyncio is needed.  Under virtual time each test runs with
several seeds of the event loop's order: ``BROKERKIT_SEEDS`` says how many, ``BROKERKIT_SEED`` picks a single one, and a
failure prints the line that repeats it.  With ``BROKERKIT_RESULTS`` the outcomes are appended to that file, which is to be
removed before a run; from it ``python -m brokerkit.testing.conformance.promises`` writes the promise table.
"""

from __future__ import annotations

from ._harness import Harness as Harness
from ._harness import Kind as Kind
from ._runner import Suite as Suite
from ._runner import needs as needs
from ._runner import restarts as restarts
from ._runner import seeds as seeds
from ._runner import suite as suite

__all__ = ["Harness", "Kind", "Suite", "needs", "restarts", "seeds", "suite"]
