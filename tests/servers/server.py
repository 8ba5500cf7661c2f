"""`RedisServer`: a server process that tests may kill, freeze and restart."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import redis
import redis.asyncio

from . import guard
from .access import ADMIN, USER, rules
from .certificates import certificates
from .ports import free_port
from .programs import Flavor, program

STARTUP: Final = 20.0
"""Seconds until a server must answer; it does so in some 20 ms."""


class RedisServer:
    """A Redis or Valkey on a free port of 127.0.0.1, with its data in a folder of its own.

    It is started by `start` or ``with`` and goes away with this process, however that ends.  The arguments are those of the
    server's own configuration; *config* takes any other.  Users are `ADMIN`, `USER` with the least rights, and those of
    *users* by name, with their rights as ``ACL SETUSER`` takes them.  Passwords that are not given are random; an empty
    one means that the user needs none.
    """

    def __init__(
        self,
        flavor: Flavor = "redis",
        *,
        appendonly: bool = False,
        appendfsync: str = "everysec",
        maxmemory: int = 0,
        tls: bool = False,
        unixsocket: bool = False,
        port: int = 0,
        users: Mapping[str, str] | None = None,
        passwords: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        assert not tls or flavor == "redis", "the wheel's Valkey is built without TLS"
        self.flavor = flavor
        self.appendonly = appendonly
        self.tls = tls
        self.host = "127.0.0.1"
        self.port = port
        """Plaintext; 0 before the first start if none was given, and the same ever after."""
        self.tls_port = 0
        self.path = ""
        """Of the unix socket."""
        self._unixsocket = unixsocket
        self._users = {ADMIN: "~* &* +@all", USER: rules(newer=flavor == "valkey"), **(users or {})}
        self.passwords = {name: secrets.token_hex(16) for name in self._users} | dict(passwords or {})
        """By user; to change one, call `passwd`."""
        self._config = {
            "bind": self.host,
            "save": '""',
            "daemonize": "no",
            "enable-debug-command": "local",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            "maxmemory": str(maxmemory),
            **(config or {}),
        }
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<RedisServer {self.flavor} on port {self.port}{'' if self.running else ', not running'}>"

    # ------------------------------------------------------------------ life
    @property
    def running(self) -> bool:
        """Whether the process lives; a frozen one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def folder(self) -> Path:
        """Where data, configuration and log are."""
        assert self._folder is not None, "the server was never started"
        return self._folder

    def start(self) -> None:
        """Start it, and return when it answers.  After `kill` it has the same port, and the data that it had on disk."""
        assert not self.running
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="brokerkit-server-"))
        end = time.monotonic() + STARTUP
        while True:
            port = self.port or free_port()
            tls_port = self.tls_port or (free_port() if self.tls else 0)
            self._launch(port, tls_port)
            try:
                if self._answers(port, end):
                    self.port, self.tls_port = port, tls_port
                    return
            except BaseException:
                self._end(signal.SIGKILL)
                raise
            text = self._log()
            self._end(signal.SIGKILL)
            if "already in use" not in text or time.monotonic() > end:
                raise RuntimeError(f"the {self.flavor} server did not start: {text[-1000:]}")
            time.sleep(0.05)  # another process was faster, or the one before has not let go yet

    def stop(self) -> None:
        """End it as its operator would, and remove its folder."""
        self.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def shutdown(self) -> None:
        """End it as its operator would: what it keeps on disk is whole."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """End it as its operator would, and start it on the same port with its data."""
        self.shutdown()
        self.start()

    def freeze(self) -> None:
        """Stop it as ``SIGSTOP`` does: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it run on after `freeze`."""
        os.kill(self.pid, signal.SIGCONT)

    def _launch(self, port: int, tls_port: int) -> None:
        folder = self.folder
        (folder / "log").write_bytes(b"")
        path = folder / "server.conf"
        path.touch(mode=0o600)
        path.write_text("\n".join(self._lines(port, tls_port)) + "\n", encoding="utf-8")
        self._process = guard.start([program(self.flavor), str(path)], log=folder / "log", folder=folder)

    def _lines(self, port: int, tls_port: int) -> list[str]:
        settings = {**self._config, "port": str(port), "dir": str(self.folder)}
        if self.tls:
            made = certificates()
            settings |= {
                "tls-port": str(tls_port),
                "tls-cert-file": made.server,
                "tls-key-file": made.server_key,
                "tls-ca-cert-file": made.authority,
                "tls-auth-clients": "optional",
            }
        if self._unixsocket:
            self.path = str(self.folder / "redis.sock")
            settings |= {"unixsocket": self.path, "unixsocketperm": "700"}
        lines = [f"{name} {value}" for name, value in settings.items()]
        for name, rights in self._users.items():
            password = self.passwords[name]
            lines.append(f"user {name} on {f'>{password}' if password else 'nopass'} {rights}")
        return lines

    def _answers(self, port: int, end: float) -> bool:
        """Wait until the server answers; return False if it has ended instead."""
        while self.running:
            assert time.monotonic() < end, f"the {self.flavor} server does not answer: {self._log()[-1000:]}"
            with contextlib.suppress(OSError):
                if self._ask(port, "PING") == b"+PONG":  # not so while it reads its data, or if it is somebody else's
                    return True
            time.sleep(0.002)
        return False

    def _ask(self, port: int, command: str) -> bytes:
        """Return the one-line answer to a command of the administrator's; this is quicker than with a client."""
        with socket.create_connection((self.host, port), timeout=STARTUP) as admin:
            admin.sendall(f"AUTH {ADMIN} {self.passwords[ADMIN] or 'any'}\r\n{command}\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2 and (data := admin.recv(1000)):
                answer += data
        return answer.removeprefix(b"+OK\r\n").rstrip(b"\r\n")

    def _log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
        try:
            process.wait(STARTUP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            guard.dismiss(process)

    # ------------------------------------------------------------------ use
    def url(
        self,
        *,
        user: str = USER,
        password: str | None = None,
        database: int = 0,
        port: int | None = None,
        tls: bool = False,
        unix: bool = False,
        query: str = "",
    ) -> str:
        """Return a URL for brokerkit, with the password of *user* unless another is given; *port* may be a proxy's."""
        secret = self.passwords.get(user, "") if password is None else password
        login = f"{quote(user, safe='')}:{quote(secret, safe='')}@"
        if unix:
            options = "&".join(part for part in (f"db={database}" if database else "", query) if part)
            return f"redis+unix://{login}{self.path}{'?' if options else ''}{options}"
        scheme = "rediss" if tls else "redis"
        at = port or (self.tls_port if tls else self.port)
        return f"{scheme}://{login}{self.host}:{at}/{database}{'?' if query else ''}{query}"

    async def command(self, *args: str | bytes | int | float, database: int = 0) -> Any:
        """Send a command as the administrator; return the answer as it came, texts in bytes."""
        client = redis.asyncio.Redis(**self._login(database))
        client.response_callbacks.clear()
        async with client:
            execute: Callable[..., Any] = getattr(client, "execute_command")  # noqa: B009 - it has no types
            return await execute(*args)

    def command_now(self, *args: str | bytes | int | float, database: int = 0) -> Any:
        """Send a command as the administrator, outside of any loop."""
        with redis.Redis(**self._login(database)) as client:
            client.response_callbacks.clear()
            execute: Callable[..., Any] = getattr(client, "execute_command")  # noqa: B009 - it has no types
            return execute(*args)

    def _login(self, database: int) -> dict[str, Any]:
        password = self.passwords[ADMIN] or None
        return {"host": self.host, "port": self.port, "db": database, "username": ADMIN, "password": password}

    def clear(self) -> None:
        """Remove all keys, in a millisecond."""
        answer = self._ask(self.port, "FLUSHALL")
        assert answer == b"+OK", answer

    async def passwd(self, user: str, password: str) -> None:
        """Give *user* another password; who is logged in stays so."""
        await self.command("ACL", "SETUSER", user, "resetpass", f">{password}")
        self.passwords[user] = password


@functools.lru_cache
def shared(flavor: Flavor) -> RedisServer:
    """Return this process's server of a flavor, with an append-only file; it is started by the first call."""
    server = RedisServer(flavor, appendonly=True)
    server.start()
    _started.append(server)
    return server


_started: list[RedisServer] = []


def stop_shared() -> None:
    """End the servers of `shared`."""
    shared.cache_clear()
    while _started:
        _started.pop().stop()
