"""A mutant: one small change to one file, the promise that it breaks, and where that should show."""

from __future__ import annotations

from dataclasses import dataclass


class Stale(Exception):
    """The text that a mutant changes is not there, or not only once."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """Replace *old*, which must be in *file* exactly once, by *new*."""

    name: str
    breaks: str
    """The promise that no longer holds."""
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """The tests that run first, as pytest names them.  If they pass all the same, every test gets its chance."""

    def apply(self, source: str) -> str:
        """Return *source* with the fault in it."""
        found = source.count(self.old)
        if found != 1:
            raise Stale(f"the text to change is in {self.file} {found} times, not once")
        if self.old == self.new:
            raise Stale("it changes nothing")
        return source.replace(self.old, self.new)


def clauses(*names: str) -> tuple[str, ...]:
    """Return the ids of conformance tests on memory: ``Group`` for a whole group, ``Group::test_name`` for one test."""
    return tuple(f"tests/conformance/test_memory.py::Test{name}" for name in names)


def units(module: str, *, test: str = "") -> tuple[str, ...]:
    """Return the id of unit tests: a whole module, like ``test_log``, or one *test* of it."""
    return (f"tests/unit/{module}.py" + (f"::{test}" if test else ""),)


def served(*names: str) -> tuple[str, ...]:
    """Return the same as `clauses` on a real Redis: ``Group::test_name``, or ``Group::test_name[queue-0]`` for one kind."""
    return tuple(f"tests/conformance/test_redis.py::Test{name}" for name in names)


def driver(module: str, *tests: str) -> tuple[str, ...]:
    """Return the ids of *tests* of ``tests/redis``; those of several servers end with ``[redis]``."""
    return tuple(f"tests/redis/{module}.py::{test}" for test in tests)


def broker(module: str, *tests: str) -> tuple[str, ...]:
    """Return the ids of *tests* of ``tests/kafka``."""
    return tuple(f"tests/kafka/{module}.py::{test}" for test in tests)
