"""Processes that fork and spawn: a child takes nothing from its parent, and nothing away."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue

from brokerkit import Queue as Address
from brokerkit import blocking
from brokerkit._thread import LOOP
from brokerkit.celery._bridge import acquire
from brokerkit.celery._url import target
from brokerkit.errors import Closed

from ..servers import RedisServer

WAIT = 20.0
WORK = Queue("work", Exchange("work"), routing_key="work")
ADDRESS = Address("plain", bytes)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def connection(server: RedisServer) -> Iterator[Any]:
    with Connection(f"brokerkit+{server.url()}") as connection:
        connection.connect()
        yield connection
        WORK(connection.default_channel).purge()


def in_child(function: Callable[[], object]) -> None:
    """Run *function* in a child process that is forked here, and raise what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            gc.collect()  # what came through the fork is not finalized
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as text:
        if not select.select([text], [], [], WAIT)[0]:  # its end closes the pipe
            os.kill(child, signal.SIGKILL)
        said = text.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said or "the child hangs"


def publish(connection: Any, *bodies: object) -> None:
    for body in bodies:
        Producer(connection).publish(body, exchange=WORK.exchange, routing_key="work", declare=[WORK])


def read(connection: Any, count: int) -> list[object]:
    got: list[Any] = []
    with connection.channel() as channel, Consumer(channel, [WORK], on_message=got.append):
        while len(got) < count:
            connection.drain_events(timeout=WAIT)
        for message in got:
            message.ack()
    return sorted(message.payload for message in got)


def test_a_child_that_uses_its_parents_connection_is_told_so(connection: Any) -> None:
    channel = connection.default_channel
    bridge = channel.bridge

    def child() -> None:
        with pytest.raises(Closed, match="belongs to the parent process"):
            bridge.call(bridge.exchanges.size, "work")
        bridge.post(print, "never")
        bridge.release()

    in_child(child)
    publish(connection, 1)
    assert read(connection, 1) == [1]


def test_a_child_connects_for_itself(connection: Any, server: RedisServer) -> None:
    publish(connection, "parent")

    def child() -> None:
        with Connection(f"brokerkit+{server.url()}") as own:
            assert acquire(target(own)) is not connection.default_channel.bridge
            publish(own, "child")

    in_child(child)
    assert read(connection, 2) == ["child", "parent"]


def test_kombu_lets_go_of_a_connection_in_a_child(connection: Any) -> None:
    """What the children of a worker do first, with all connections that they find."""
    got: list[Any] = []
    consumer = Consumer(connection.channel(), [WORK], on_message=got.append, prefetch_count=10)
    consumer.consume()
    publish(connection, 1, 2)
    while len(got) < 2:
        connection.drain_events(timeout=WAIT)
    channel = consumer.channel

    def child() -> None:
        begin = time.monotonic()
        connection.collect()
        assert channel.closed
        assert not channel.qos.items
        channel.close()
        assert time.monotonic() - begin < 5

    for _ in range(3):  # as children are replaced
        in_child(child)
    publish(connection, 3)
    while len(got) < 3:
        connection.drain_events(timeout=WAIT)
    for message in got:
        message.ack()
    consumer.cancel()
    channel.close()
    assert connection.default_channel.basic_get("work") is None


def test_a_child_has_no_descriptor_of_its_parents_connections(connection: Any) -> None:
    publish(connection, 1)
    portal = LOOP._portal
    assert portal is not None
    selector: Any = portal.loop._selector  # type: ignore[attr-defined]
    descriptors = [*selector.get_map(), selector.fileno()]
    assert len(descriptors) >= 3

    def child() -> None:
        for descriptor in descriptors:
            assert os.readlink(f"/proc/self/fd/{descriptor}") == os.devnull
            os.close(descriptor)  # whatever the child does with them

    in_child(child)
    assert read(connection, 1) == [1]


def test_a_child_of_a_child_connects_too(server: RedisServer, connection: Any) -> None:
    def grandchild() -> None:
        with Connection(f"brokerkit+{server.url()}") as own:
            publish(own, "grandchild")

    def child() -> None:
        with Connection(f"brokerkit+{server.url()}") as own:
            publish(own, "child")
            in_child(grandchild)
            publish(own, "child again")

    in_child(child)
    assert read(connection, 3) == ["child", "child again", "grandchild"]


def test_the_blocking_facade_works_in_a_child_beside_it(server: RedisServer, connection: Any) -> None:
    publish(connection, 1)
    with blocking.connect(server.url()) as outer:
        outer.publish(ADDRESS, b"parent")

        def child() -> None:
            with blocking.connect(server.url()) as own:
                own.publish(ADDRESS, b"child")

        in_child(child)
        outer.publish(ADDRESS, b"parent")
    assert read(connection, 1) == [1]


def spawned(url: str) -> None:
    with Connection(url) as connection:
        publish(connection, "spawned")


def test_a_spawned_process_connects(server: RedisServer, connection: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=spawned, args=(f"brokerkit+{server.url()}",))
    process.start()
    process.join(WAIT)
    assert process.exitcode == 0
    assert read(connection, 1) == ["spawned"]


def test_greenlets_go_on_while_one_waits(server: RedisServer) -> None:
    """Under gevent the loop has a thread of the system, and asyncio stays usable in greenlets."""
    program = f"""
        from gevent import monkey; monkey.patch_all()
        import asyncio, gevent
        from kombu import Connection, Producer
        from brokerkit import Queue, blocking

        turns = []
        def turn():
            while True:
                turns.append(1)
                gevent.sleep(0)
        turning = gevent.spawn(turn)

        with Connection("brokerkit+{server.url()}") as connection:
            def one(number):
                Producer(connection.default_channel).publish(number, routing_key="green")
            connection.default_channel.queue_declare("green")
            gevent.joinall([gevent.spawn(one, number) for number in range(50)], raise_error=True)
            assert connection.default_channel.queue_declare("green", passive=True).message_count == 50
            async def main():
                await asyncio.sleep(0)
                return 42
            assert gevent.spawn(lambda: asyncio.run(main())).get() == 42
            before = len(turns)
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                pass
            assert len(turns) > before
        with blocking.connect("{server.url()}") as broker:
            broker.publish(Queue("green2", bytes), b"x")
        turning.kill()
        print("done")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
