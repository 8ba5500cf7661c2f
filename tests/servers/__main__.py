"""``python -m tests.servers``: run a development Redis until Ctrl-C.  With ``--check`` only make sure that all servers are there."""

from __future__ import annotations

import signal
import socket
import sys
import threading

from .access import ADMIN
from .programs import Flavor, Missing, program, require
from .server import RedisServer

PORT = 6379


def flavor() -> Flavor:
    """Return what there is, Redis before Valkey."""
    try:
        program("redis")
    except Missing:
        program("valkey")
        return "valkey"
    return "redis"


def port() -> int:
    """Return the usual port if nobody has it, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            return 0
    return PORT


def serve() -> None:
    """Run a server that asks for no password, with an append-only file that ends with it."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with RedisServer(flavor(), appendonly=True, port=port(), passwords={ADMIN: ""}) as server:
        name = {"redis": "Redis", "valkey": "Valkey"}[server.flavor]
        told = server.command_now("INFO", "server")
        print(f"{name} {version(told, server.flavor)} is ready: redis://localhost:{server.port}/0", flush=True)
        print(f"  make demo URL=redis://localhost:{server.port}/0", flush=True)
        print("Ctrl-C ends it, and removes its data.", flush=True)
        while server.running and not ended.wait(0.2):
            pass
        if not ended.is_set():
            raise Missing(f"the server has ended by itself: {server.folder / 'log'}")


def version(info: bytes, name: str) -> str:
    """Return the version out of the answer to INFO."""
    for line in info.decode().splitlines():
        if line.startswith(f"{name}_version:"):
            return line.partition(":")[2]
    return ""


try:
    if sys.argv[1:] == ["--check"]:
        require()
    else:
        serve()
except Missing as error:
    sys.exit(str(error))
