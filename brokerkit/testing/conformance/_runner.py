"""Turns ``async def test_...`` methods into plain functions that pytest collects, and watches each run for leaks."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import os
import pkgutil
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias, TypeVar, get_args

import pytest

from ... import policy
from .._loop import VirtualLoop
from ._harness import Harness, Kind

Test: TypeAlias = Callable[..., Coroutine[Any, Any, None]]
F = TypeVar("F", bound=Callable[..., Any])
SEEDS = 3


class Suite:
    """Base of all groups of tests.

    A test takes the harness, and *kind* if it holds for topics and queues alike: then it runs once on each.
    """

    label: ClassVar[str] = ""


def needs(*what: str) -> Callable[[F], F]:
    """Generate the test, or all of a class, only where the harness claims all of *what*.

    ``"topic"`` or ``"queue"`` stands for a kind of address that a test without *kind* uses; ``"queue.delay"`` for a
    capability of it; ``"shared"`` alone for a capability of the kind at hand.  What is not claimed must be refused, which is
    tested in ``capabilities``; ``"not queue.shared"`` marks such a test of what only real lack can show.  ``"bounded"`` stands
    for `Harness.bounded`.
    """

    def mark(test: F) -> F:
        setattr(test, "needs", what)  # noqa: B010
        return test

    return mark


def seeds(count: int) -> Callable[[F], F]:
    """Run the test with at most *count* seeds by default: for tests that are long, or do not depend on any order."""

    def mark(test: F) -> F:
        setattr(test, "seeds", count)  # noqa: B010
        return test

    return mark


def restarts(test: F) -> F:
    """Mark a test that restarts the system, which `Harness.alone` tells the harness."""
    setattr(test, "restarts", True)  # noqa: B010
    return test


def discover() -> list[type[Suite]]:
    """Return all groups of tests, those of modules beside this one."""
    package = __package__ or ""
    names = [
        f"{package}.{m.name}" for m in pkgutil.iter_modules([os.path.dirname(__file__)]) if not m.name.startswith("_")
    ]
    pytest.register_assert_rewrite(*(name for name in names if not name.endswith(".promises")))
    found: list[type[Suite]] = []
    for name in sorted(names):
        for member in vars(importlib.import_module(name)).values():
            if isinstance(member, type) and issubclass(member, Suite) and member.__module__ == name:
                found.append(member)
    return found


def tests(group: type[Suite]) -> dict[str, Test]:
    """Return the tests of *group* by name."""
    return {name: test for name, test in vars(group).items() if name.startswith("test_")}


def needed(name: str) -> tuple[str, ...]:
    """Return the `needs` of a test, which is named as in results: with its group."""
    wanted, _, test = name.partition(".")
    (group,) = (group for group in discover() if group.__name__ == wanted)
    return _needs(group, tests(group)[test])


def _needs(group: type[Suite], test: Test) -> tuple[str, ...]:
    return (*getattr(group, "needs", ()), *getattr(test, "needs", ()))


def suite(harness: type[Harness]) -> dict[str, type]:
    """Return the test classes for *harness*, to be put into the globals of a test module."""
    made: dict[str, type] = {}
    for group in discover():
        body = {name: _plain(harness, group, name, test) for name, test in tests(group).items()}
        body = {name: test for name, test in body.items() if test is not None}
        if body:
            name = f"Test{group.__name__}"
            assert name not in made, f"two groups are called {group.__name__}"
            made[name] = type(name, (), {"__doc__": group.__doc__, **body})
    return made


def _kinds(harness: type[Harness], group: type[Suite], test: Test) -> list[Kind | None]:
    """Return on which kinds of address *test* runs: None where it chooses itself, nothing where it does not apply."""
    own = "kind" in inspect.signature(test).parameters
    wanted = _needs(group, test)
    claimed = {"topic": harness.topics, "queue": harness.queues}

    def claims(what: str, kind: Kind | None) -> bool:
        if what.startswith("not "):
            return not claims(what.removeprefix("not "), kind)
        if what == "bounded":
            return harness.bounded is not None
        name, _, capability = what.rpartition(".") if "." in what or what not in claimed else (what, "", "")
        claim = claimed[name or kind or ""]
        return claim is not None and (not capability or bool(getattr(claim, capability)))

    kinds: list[Kind | None] = [kind for kind in get_args(Kind) if claimed[kind] is not None] if own else [None]
    return [kind for kind in kinds if all(claims(what, kind) for what in wanted)]


def _plain(harness: type[Harness], group: type[Suite], name: str, test: Test) -> Callable[..., None] | None:
    kinds = _kinds(harness, group, test)
    if not kinds:
        return None
    numbers = _seeds(test) if harness.virtual else [0]

    def plain(self: object, kind: Kind | None, seed: int) -> None:
        _run(harness, group, test, kind, seed, last=seed == numbers[-1])

    plain.__name__, plain.__qualname__, plain.__doc__ = name, f"{group.__name__}.{name}", test.__doc__
    cases = [(kind, seed) for kind in kinds for seed in numbers]
    ids = ["-".join(str(part) for part in case if part is not None) for case in cases]
    marked: Callable[..., None] = pytest.mark.parametrize(("kind", "seed"), cases, ids=ids)(plain)
    return marked


def _seeds(test: Test) -> list[int]:
    single = os.environ.get("BROKERKIT_SEED")
    if single is not None:
        return [int(single)]
    most = os.environ.get("BROKERKIT_SEEDS")
    return list(range(int(most) if most else min(SEEDS, getattr(test, "seeds", SEEDS))))


def _run(harness: type[Harness], group: type[Suite], test: Test, kind: Kind | None, seed: int, *, last: bool) -> None:
    began = time.perf_counter()
    error = "did not end"
    gc.freeze()  # what was there before is not looked at: collecting costs only what this test has made
    try:
        with _leaks(thorough=last):
            random.seed(seed)
            policy._RANDOM.seed(seed)
            errors: list[dict[str, Any]] = []
            factory = (lambda: VirtualLoop(seed)) if harness.virtual else asyncio.new_event_loop
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.get_loop().set_exception_handler(lambda loop, context: errors.append(context))
                runner.run(_main(harness, group, test, kind))
            if last:
                gc.collect()
                gc.freeze()  # what is left stays: looking at it again after every test would take most of the time
            assert not errors, f"errors that nobody received: {errors}"
        error = ""
    except BaseException as exc:
        error = f"{type(exc).__name__}: {exc}"
        if harness.virtual:
            node = os.environ.get("PYTEST_CURRENT_TEST", test.__qualname__).rpartition("[")[0]
            exc.add_note(f"repeat it: BROKERKIT_SEED={seed} python -m pytest '{node}'")
        raise
    finally:
        gc.unfreeze()
        _record(harness, group, test, kind, seed, error, time.perf_counter() - began)


async def _main(harness: type[Harness], group: type[Suite], test: Test, kind: Kind | None) -> None:
    # In virtual time a day costs nothing, and a test that hangs must end as a failure, not as a hang.
    limit = (24 if harness.virtual else 5) * harness.deadline
    async with asyncio.timeout(limit):
        system = harness()
        system.alone = getattr(test, "restarts", False)
        async with system:
            await (test(group(), system) if kind is None else test(group(), system, kind))
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"tasks left running: {left}"


@contextmanager
def _leaks(*, thorough: bool) -> Iterator[None]:
    threads = set(threading.enumerate())
    sockets = _sockets()
    yield
    alive = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in alive:
        thread.join(1)  # of a pool that is told to end: it does so in a moment
    alive = [thread for thread in alive if thread.is_alive()]
    assert not alive, f"threads left running: {alive}"
    if thorough:
        opened = _sockets() - sockets
        assert not opened, f"sockets left open: {opened}"


def _sockets() -> set[str]:
    found: set[str] = set()
    try:
        for number in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{number}")
            except OSError:  # closed meanwhile: it was the listing's own
                continue
            if target.startswith("socket:"):
                found.add(target)
    except FileNotFoundError:  # no /proc here
        return set()
    return found


def _record(
    harness: type[Harness], group: type[Suite], test: Test, kind: Kind | None, seed: int, error: str, took: float
) -> None:
    path = os.environ.get("BROKERKIT_RESULTS")
    if not path:
        return
    claimed = {"topic": harness.topics, "queue": harness.queues}
    line = {
        "column": harness.column,
        "test": f"{group.__name__}.{test.__name__}",
        "kinds": [kind] if kind else [name for name in claimed if claimed[name] and name in _used(group, test)],
        "claims": [
            f"{name}.{field}"
            for name, claim in claimed.items()
            if claim is not None
            for field in claim.__struct_fields__
            if getattr(claim, field) is True
        ],
        "seed": seed,
        "ok": not error,
        "error": error[:200],
        "took": round(took, 4),
    }
    with open(path, "a", encoding="utf-8") as file:  # in one write, as several processes append
        file.write(json.dumps(line) + "\n")


def _used(group: type[Suite], test: Test) -> set[str]:
    """Return the kinds of address that a test without *kind* uses."""
    return {what.removeprefix("not ").partition(".")[0] for what in _needs(group, test)} or set(get_args(Kind))
