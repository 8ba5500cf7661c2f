"""``python -m tests.servers``: run a development Redis and Kafka until Ctrl-C.  With ``--check`` only make sure that all servers are there."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading

from . import kafka
from .access import ADMIN
from .programs import Flavor, Missing, program, require
from .server import RedisServer

PORT = 6379
KAFKA = 9092


def flavor() -> Flavor:
    """Return what there is, Redis before Valkey."""
    try:
        program("redis")
    except Missing:
        program("valkey")
        return "valkey"
    return "redis"


def port(usual: int) -> int:
    """Return the usual port if nobody has it, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            return 0
    return usual


def serve() -> None:
    """Run servers that ask for no password, with data that ends with them."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with RedisServer(flavor(), appendonly=True, port=port(PORT), passwords={ADMIN: ""}) as server:
        name = {"redis": "Redis", "valkey": "Valkey"}[server.flavor]
        told = server.command_now("INFO", "server")
        say(f"{name} {version(told, server.flavor)}", f"redis://localhost:{server.port}/0")
        with contextlib.ExitStack() as stack:
            cluster = kafka.KafkaCluster(listeners=("PLAIN",), ports={1: {"PLAIN": port(KAFKA)}})
            try:
                kafka.prepare()
            except Missing as error:
                print(f"No Kafka: {error}", flush=True)
            else:
                stack.enter_context(cluster)
                say(f"Kafka {cluster.version}", f"kafka://localhost:{cluster.endpoints.ports[1]['PLAIN']}")
            print("Ctrl-C ends all, and removes the data.", flush=True)
            while server.running and not ended.wait(0.2):
                pass
        if not ended.is_set():
            raise Missing(f"the server has ended by itself: {server.folder / 'log'}")


def say(what: str, url: str) -> None:
    """Print where a server is, and what to do with it."""
    print(f"{what} is ready: {url}", flush=True)
    print(f"  make demo URL={url}", flush=True)


def version(info: bytes, name: str) -> str:
    """Return the version out of the answer to INFO."""
    for line in info.decode().splitlines():
        if line.startswith(f"{name}_version:"):
            return line.partition(":")[2]
    return ""


try:
    if sys.argv[1:] == ["--check"]:
        require()
        kafka.prepare()
    else:
        serve()
except Missing as error:
    sys.exit(str(error))
