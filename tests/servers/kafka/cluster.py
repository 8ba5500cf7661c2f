"""`KafkaCluster`: one or three brokers that tests may kill, freeze and restart."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives import serialization

from .. import guard
from ..access import USER
from ..certificates import certificates
from ..ports import free_port
from . import programs, settings
from .endpoints import Endpoints
from .programs import HERE, Version
from .settings import ADMIN, LISTENERS, MECHANISMS, Listener
from .wire import Wire

STARTUP: Final = 100.0
"""Seconds until a broker must answer; alone and with its archive of classes it does so in one."""
CLUSTER_ID: Final = "brokerkit0tests0000000"
LOGGING: Final = f"-Dlog4j2.configurationFile=file:{HERE / 'log4j2.properties'}"


class KafkaCluster:
    """Brokers on free ports of 127.0.0.1, each with its data in a folder of its own; every one is a controller too.

    It is started by `start` or ``with`` and goes away with this process, however that ends, or with the one that owns *within*,
    the folder of a `Run`.  Nodes are numbered from 1 on.  With *rights* nobody may do anything but `ADMIN`, who
    comes by PLAIN or SCRAM, and who comes over plaintext; `Endpoints.wire` gives rights.  *users* are further ones, with
    their passwords; *config* takes any setting of ``server.properties``.
    """

    def __init__(
        self,
        version: Version = "4.3.1",
        *,
        brokers: int = 1,
        rights: bool = False,
        autocreate: bool = False,
        listeners: tuple[Listener, ...] = LISTENERS,
        mechanisms: tuple[str, ...] = MECHANISMS,
        users: Mapping[str, str] | None = None,
        ports: Mapping[int, Mapping[str, int]] | None = None,
        config: Mapping[str, str] | None = None,
        jvm: tuple[str, ...] = (),
        within: Path | None = None,
    ) -> None:
        self.version: Version = version
        self.users = {ADMIN: "admin-secret", USER: "brokerkit-secret", **(users or {})}
        """With their passwords: always the same, so that formatted storage can be kept."""
        self._wanted = (*(["PLAIN"] if "PLAIN" not in listeners else []), *listeners, "CONTROLLER")
        self._given = {node: dict((ports or {}).get(node, {})) for node in range(1, brokers + 1)}
        self._config = {
            **settings.SMALL,
            **settings.QUICK,
            **settings.copies(brokers),
            **settings.passwords(self.users, mechanisms),
            **(settings.RIGHTS if rights else {}),
            "auto.create.topics.enable": "true" if autocreate else "false",
            **(config or {}),
        }
        self._jvm = jvm
        self._within = within
        self._folder: Path | None = None
        self._endpoints: Endpoints | None = None
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<KafkaCluster {self.version} of {len(self._given)}, running {sorted(self._processes)}>"

    # ------------------------------------------------------------------ life
    @property
    def endpoints(self) -> Endpoints:
        """How to reach it."""
        assert self._endpoints is not None, "the cluster was never started"
        return self._endpoints

    @property
    def folder(self) -> Path:
        """Where each broker has a folder with data, configuration and log."""
        assert self._folder is not None, "the cluster was never started"
        return self._folder

    @property
    def nodes(self) -> list[int]:
        """The numbers of all brokers, running or not."""
        return list(self._given)

    def running(self, node: int = 1) -> bool:
        """Return whether a broker's process lives; a frozen one does."""
        return node in self._processes and self._processes[node].poll() is None

    def pid(self, node: int = 1) -> int:
        """Return the number of a broker's process."""
        return self._processes[node].pid

    def log(self, node: int = 1) -> str:
        """Return what a broker has written since its last start."""
        return (self.folder / str(node) / "log").read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start all brokers, and return when they answer and know each other."""
        programs.java()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="brokerkit-kafka-", dir=self._within))
        for attempt in itertools.count():
            try:
                self._start_all()
            except Busy:
                self.kill_all()
                if attempt == 5:
                    raise
                self._endpoints = None
            else:
                return

    def _start_all(self) -> None:
        if self._endpoints is None:
            ports = {
                node: {name: given.get(name) or free_port() for name in self._wanted}
                for node, given in self._given.items()
            }
            self._endpoints = Endpoints(self.version, ports, self.users, str(self.folder / "tls"))
            _certify(self.folder / "tls")
        for node in self.nodes:
            self._launch(node)
        for node in self.nodes:
            self._wait(node, len(self.nodes))

    def stop(self) -> None:
        """Kill all brokers and remove their folder: nothing of them is needed any more."""
        self.kill_all()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill_all(self) -> None:
        """End all brokers as ``kill -9`` does."""
        for process in self._processes.values():
            process.kill()
        for node in list(self._processes):
            self.kill(node)

    def kill(self, node: int = 1) -> None:
        """End a broker as ``kill -9`` does."""
        self._end(node, signal.SIGKILL)

    def shutdown(self, node: int = 1) -> None:
        """End a broker as its operator would: it hands over what it leads."""
        self._end(node, signal.SIGTERM)

    def revive(self, node: int = 1) -> None:
        """Start a broker that has ended, with its data, and return when it is part of the cluster again."""
        assert not self.running(node)
        self._launch(node)
        self._wait(node, 1)

    def restart(self, node: int = 1) -> None:
        """End a broker as its operator would, and start it again with its data."""
        self.shutdown(node)
        self.revive(node)

    def freeze(self, node: int = 1) -> None:
        """Stop a broker as ``SIGSTOP`` does: connections stay open, nothing is answered."""
        os.kill(self.pid(node), signal.SIGSTOP)

    def thaw(self, node: int = 1) -> None:
        """Let a broker run on after `freeze`."""
        os.kill(self.pid(node), signal.SIGCONT)

    def leader(self, topic: str, partition: int = 0) -> int:
        """Return which broker leads a partition, -1 for none."""
        with self.endpoints.wire() as admin:
            return admin.cluster([topic]).topics[topic][partition]

    def abandon(self) -> None:
        """Leave the brokers to the owner of the run, whose end they will notice."""
        assert self._within is not None
        while self._processes:
            _, process = self._processes.popitem()
            process.returncode = 0  # as far as this process is concerned

    # ------------------------------------------------------------------ processes
    def _launch(self, node: int) -> None:
        folder = self.folder / str(node)
        if not folder.exists():
            shutil.copytree(self._format(node), folder)
        (folder / "log").write_bytes(b"")
        (folder / "server.properties").write_text(self._properties(node, folder), encoding="utf-8")
        archive = programs.archive(self.version)
        options = (*programs.JVM, *self._jvm, *([f"-XX:SharedArchiveFile={archive}"] if archive else []), LOGGING)
        command = [
            programs.java(),
            *options,
            "-cp",
            programs.classpath(self.version),
            "kafka.Kafka",
            "server.properties",
        ]
        alive: int = subprocess.PIPE
        if self._within is not None:
            # Without waiting for a writer: if there is none any more, the broker ends at once.
            alive = os.open(self._within / "alive", os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(alive, True)
        self._processes[node] = guard.start(
            command, log=folder / "log", cwd=folder, folder=self._within or self.folder, alive=alive
        )
        if alive >= 0:
            os.close(alive)

    def _properties(self, node: int, folder: Path) -> str:
        lines = {
            **self._config,
            **settings.listening(node, self.endpoints.ports),
            **settings.certificates(self.endpoints.tls),
            "log.dirs": str(folder / "data"),
        }
        return "".join(f"{name}={value}\n" for name, value in lines.items())

    def _format(self, node: int) -> Path:
        """Return a folder with formatted storage; this takes a Java of its own, once for all servers like this one."""
        key = f"{node} of {len(self.nodes)} {sorted(self.users.items())}"

        def make(folder: Path) -> None:
            path = folder / "server.properties"
            path.write_text(self._properties(node, folder), encoding="utf-8")
            scram = [
                ("--add-scram", f"SCRAM-SHA-{size}=[name={name},password={password}]")
                for name, password in self.users.items()
                for size in (256, 512)
            ]
            tool = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(path), *itertools.chain(*scram)]
            command = [programs.java(), *programs.JVM, LOGGING, "-cp", programs.classpath(self.version), *tool]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
            path.unlink()

        return programs.formatted(self.version, key, make)

    def _wait(self, node: int, least: int) -> None:
        """Return when a broker answers, and knows a controller and at least so many brokers, itself among them."""
        end = time.monotonic() + STARTUP
        port = self.endpoints.ports[node]["PLAIN"]
        while True:
            if not self.running(node):
                text = self.log(node)
                self._end(node, signal.SIGKILL)
                said = f"Kafka {self.version} did not start: {text[-2000:]}"
                raise (Busy if "Address already in use" in text else RuntimeError)(said)
            try:
                with Wire(port, timeout=STARTUP) as admin:
                    known = admin.cluster()
                if node in known.brokers and len(known.brokers) >= least and known.controller > 0:
                    return
            except OSError:
                pass
            assert time.monotonic() < end, f"Kafka {self.version} does not answer: {self.log(node)[-2000:]}"
            time.sleep(0.02)

    def _end(self, node: int, number: int) -> None:
        process = self._processes.pop(node, None)
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(STARTUP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if process.stdin is not None:
                guard.dismiss(process)


class Busy(RuntimeError):
    """Another process was faster to take a port."""


def _certify(folder: Path) -> None:
    """Put certificates into *folder*, for the brokers as Kafka wants them: with the key in PKCS 8, and in one file."""
    made = certificates()
    folder.mkdir(exist_ok=True)
    for path in (made.authority, made.client, made.client_key, made.stranger):
        shutil.copy(path, folder)
    key = serialization.load_pem_private_key(Path(made.server_key).read_bytes(), password=None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keystore = folder / "keystore.pem"
    keystore.touch(mode=0o600)
    keystore.write_bytes(key.private_bytes(*form) + Path(made.server).read_bytes())


def prepare() -> None:
    """Make sure that all that brokers need is there, and that they start quickly.

    Raises:
        Missing: something is missing.
    """

    def run(version: Version, options: tuple[str, ...]) -> None:
        with KafkaCluster(version, jvm=options) as cluster:
            with cluster.endpoints.wire() as admin:
                admin.create("topic")
            cluster.shutdown()

    programs.prepare(run)
