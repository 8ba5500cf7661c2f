"""The way from the threads of Celery to the event loop and back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from kombu import Connection

from brokerkit import Queue
from brokerkit.celery import _bridge, _collect
from brokerkit.celery._bridge import Bridge, acquire
from brokerkit.celery._url import Target, target
from brokerkit.errors import BrokerUnavailable, Closed

WAIT = 20.0
"""Seconds that no wait here needs."""
QUEUE = Queue("bridge", bytes)


def to(url: str, **options: object) -> Target:
    return target(Connection(url, transport_options=options))


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    bridge = acquire(to("brokerkit+memory://bridge"))
    yield bridge
    bridge.release()


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def fail(error: BaseException) -> None:
    raise error


# ------------------------------------------------------------------ calls


def test_a_call_returns_what_the_coroutine_returns(bridge: Bridge) -> None:
    assert bridge.call(twice, 21) == 42


def test_a_call_raises_what_the_coroutine_raises(bridge: Bridge) -> None:
    with pytest.raises(LookupError, match="no such thing"):
        bridge.call(fail, LookupError("no such thing"))


def test_many_threads_call_at_once(bridge: Bridge) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda number: bridge.call(twice, number), range(200))) == [2 * n for n in range(200)]


def test_a_call_that_gets_no_answer_in_time_is_stopped(bridge: Bridge) -> None:
    stopped = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(BrokerUnavailable, match=r"memory did not answer within 0\.05 s"):
        bridge.call(forever, timeout=0.05)
    assert stopped.wait(WAIT)


def test_a_call_from_the_loop_itself_is_refused_at_once(bridge: Bridge) -> None:
    async def inside() -> None:
        with pytest.raises(RuntimeError, match="thread of its own event loop"):
            bridge.call(twice, 1)

    bridge.call(inside)


def test_no_call_waits_for_ever(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bridge, "CALL", 0.05)
    with pytest.raises(BrokerUnavailable):
        bridge.call(asyncio.Event().wait)


def test_a_call_is_stopped_even_if_a_cancellation_gets_lost(bridge: Bridge) -> None:
    stopped = threading.Event()

    async def stubborn() -> None:
        with suppress(asyncio.CancelledError):  # as client libraries do, where an answer comes at the same time
            await asyncio.Event().wait()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(BrokerUnavailable):
        bridge.call(stubborn, timeout=0.05)
    assert stopped.wait(WAIT)


def test_what_interrupts_the_caller_stops_the_call(bridge: Bridge) -> None:
    class TimeIsOver(Exception):
        pass

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeIsOver

    stopped = threading.Event()

    async def forever() -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)  # like Celery's soft time limit
            await asyncio.Event().wait()
        finally:
            stopped.set()

    before = signal.signal(signal.SIGUSR1, over)
    try:
        with pytest.raises(TimeIsOver):
            bridge.call(forever)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped.wait(WAIT)
    assert bridge.call(twice, 1) == 2


def test_nothing_waits_while_frames_are_collected(bridge: Bridge) -> None:
    token = _collect.frames.set([])
    try:
        with pytest.raises(_collect.WouldBlock):
            bridge.call(twice, 1)
    finally:
        _collect.frames.reset(token)


# ------------------------------------------------------------------ posts


def test_posts_are_done_in_order_with_one_wake_up_for_many(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    wakes: list[object] = []
    hold, held, done = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait(WAIT)

    bridge.post(wait)
    assert held.wait(WAIT)
    wake = bridge.loop.call_soon_threadsafe

    def counted(*args: Any, **options: Any) -> asyncio.Handle:
        wakes.append(args)
        return wake(*args, **options)

    monkeypatch.setattr(bridge.loop, "call_soon_threadsafe", counted)
    for number in range(100):
        bridge.post(seen.append, number)
    bridge.post(done.set)
    hold.set()
    assert done.wait(WAIT)
    assert seen == list(range(100))
    assert len(wakes) <= 1


def test_a_post_that_fails_stops_no_other(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()

    def broken() -> None:
        raise LookupError("broken")

    bridge.post(broken)
    bridge.post(done.set)
    assert done.wait(WAIT)
    assert "broken" in caplog.text


# ------------------------------------------------------------------ life


def test_equal_targets_share_a_bridge() -> None:
    one, same = acquire(to("brokerkit+memory://shared")), acquire(to("brokerkit+memory://shared"))
    other = acquire(to("brokerkit+memory://shared", prefix="other."))
    try:
        assert one is same
        assert other is not one
        assert one.loop is other.loop
    finally:
        for bridge in (one, same, other):
            bridge.release()


def test_threads_that_begin_together_share_a_bridge() -> None:
    with ThreadPoolExecutor(8) as pool:
        bridges = list(pool.map(lambda _: acquire(to("brokerkit+memory://together")), range(8)))
    assert len(set(map(id, bridges))) == 1
    for bridge in bridges:
        bridge.release()


def test_a_bridge_without_users_stays_open_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bridge, "LINGER", 60.0)
    bridge = acquire(to("brokerkit+memory://lingering"))
    bridge.release()
    again = acquire(to("brokerkit+memory://lingering"))
    assert again is bridge
    again.release()


def closing(bridge: Bridge) -> Future[None]:
    """Return what is set when the broker of *bridge* is closed."""
    closed: Future[None] = Future()
    leave: Callable[..., Any] = bridge.broker.__aexit__

    async def left(*args: object) -> None:
        await leave(*args)
        closed.set_result(None)

    bridge.broker.__dict__["__aexit__"] = left
    return closed


def test_a_bridge_without_users_is_closed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bridge, "LINGER", 0.01)
    bridge = acquire(to("brokerkit+memory://leaving"))
    closed = closing(bridge)
    bridge.release()
    closed.result(WAIT)
    again = acquire(to("brokerkit+memory://leaving"))
    assert again is not bridge
    assert again.call(twice, 1) == 2
    again.release()


def test_a_broker_that_is_absent_is_tried_anew_each_time() -> None:
    absent = to("brokerkit+kafka://127.0.0.1:1", connect_timeout=0.3)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            acquire(absent)


async def away(_: Bridge) -> None:
    raise BrokerUnavailable("away")


def test_who_connects_while_the_broker_is_away_takes_the_bridge_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = acquire(to("brokerkit+memory://outage"))
    with monkeypatch.context() as outage:
        outage.setattr(Bridge, "_look", away)
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                acquire(to("brokerkit+memory://outage"))
    again = acquire(to("brokerkit+memory://outage"))
    assert again is bridge
    assert bridge.users == 2
    bridge.release()
    again.release()


def test_a_bridge_that_only_such_have_tried_is_closed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bridge, "LINGER", 0.01)
    bridge = acquire(to("brokerkit+memory://abandoned"))
    closed = closing(bridge)
    bridge.users = 0  # as between a release and the end of its time
    monkeypatch.setattr(Bridge, "_look", away)
    with pytest.raises(BrokerUnavailable):
        acquire(to("brokerkit+memory://abandoned"))
    closed.result(WAIT)


def test_the_end_of_a_process_closes_its_connections() -> None:
    program = """
        import logging
        logging.basicConfig(level="INFO", format="%(message)s")
        from kombu import Connection
        from brokerkit.celery._bridge import acquire
        from brokerkit.celery._url import Target, target
        acquire(target(Connection("brokerkit+memory://ending")))
        print("at its end", flush=True)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "at its end\n")
    assert ran.stderr.splitlines()[-1] == "disconnected from memory://ending"


def test_a_closed_bridge_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "brokerkit")
    monkeypatch.setattr(_bridge, "LINGER", 0.01)
    bridge = acquire(to("brokerkit+memory://closed"))
    closed = closing(bridge)
    bridge.release()
    closed.result(WAIT)
    with pytest.raises(Closed):
        bridge.call(bridge.broker.publish, QUEUE, b"x")
