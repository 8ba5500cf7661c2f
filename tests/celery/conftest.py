"""What the tests of this folder share: marks say which cells of the tables in docs/celery.md a test proves."""

from __future__ import annotations

from .features import pytest_configure, pytest_itemcollected, pytest_runtest_makereport

__all__ = ["pytest_configure", "pytest_itemcollected", "pytest_runtest_makereport"]
