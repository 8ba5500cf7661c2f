"""Mutants below the driver contract: the memory driver, and the tracker that log-like sources share."""

from __future__ import annotations

from .mutant import Mutant, clauses, units

DRIVER: tuple[Mutant, ...] = (
    Mutant(
        name="a crash is not counted",
        breaks="a crash counts one delivery",
        file="brokerkit/drivers/_log.py",
        old="counts[offset] = (deliveries + 1, attempts)",
        new="counts[offset] = (deliveries, attempts)",
        tests=(*units("test_log"), *clauses("DriverReceive::test_a_crash_counts_one_delivery")),
    ),
    Mutant(
        name="a crash forgets attempts",
        breaks="failed attempts survive a crash",
        file="brokerkit/drivers/_log.py",
        old="counts[offset] = (deliveries + 1, attempts)",
        new="counts[offset] = (deliveries + 1, 0)",
        tests=(*units("test_log"), *clauses("DriverHold")),
    ),
)
