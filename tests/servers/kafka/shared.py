"""Brokers that all processes of a run of tests share: a Java is too heavy for each of them to have its own.

`Run` belongs to the process that the others are started by.  Whoever of them needs a broker first starts it, and it ends with
the run's process, however that ends: nobody else can write to the pipe that the broker's guard waits at.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final, Self

from .cluster import KafkaCluster
from .endpoints import Endpoints
from .programs import Version
from .rights import rights as rights_of

PREFIX: Final = "t."
"""What the names of all topics begin with that may be used where rights are asked for."""
VARIABLE: Final = "BROKERKIT_RUN"
"""Names the folder of the run to the processes of it."""
PATIENCE: Final = 20.0


class Run:
    """A folder for what the processes of a run share, named to them by the environment; unused it costs nothing."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="brokerkit-run-"))
        os.mkfifo(self.folder / "alive")
        # For reading too, as otherwise opening would wait for a reader.
        self._alive = os.open(self.folder / "alive", os.O_RDWR)
        self._owner = os.getpid()
        self._before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all brokers of this run, and return when they and their data are gone."""
        alive, self._alive = self._alive, -1
        if alive < 0:
            return
        brokers = [int(json.loads(path.read_text())["pid"]) for path in self.folder.glob("*.json")]
        os.close(alive)
        if self._owner != os.getpid():
            return  # a fork of the owner, to whom it all belongs
        if self._before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = self._before
        end = time.monotonic() + PATIENCE
        while any(running(number) for number in brokers) or (brokers and self.folder.exists()):
            assert time.monotonic() < end, f"a broker of {brokers} has outlived its run: {self.folder}"
            time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache
def shared_kafka(version: Version = "4.3.1", *, rights: bool = False) -> Endpoints:
    """Return the broker of this run, started by the first call in any of its processes.

    Tests that use it have names of their own and leave nothing behind; one that breaks its broker makes its own `KafkaCluster`.
    """
    folder = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else _own().folder
    name = f"kafka-{version}{'-rights' if rights else ''}"
    told = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            cluster = KafkaCluster(version, rights=rights, within=folder)
            try:
                cluster.start()
                with cluster.endpoints.wire() as admin:
                    admin.coordinator("group")  # what the first group waits for is not what its test is about
                    if version != "3.9.2":
                        admin.keeper()
                    if rights:
                        admin.allow(rights_of(PREFIX))
            except BaseException:
                cluster.stop()
                raise
            told.write_text(json.dumps({"pid": cluster.pid(), "endpoints": cluster.endpoints.dump()}), encoding="utf-8")
            cluster.abandon()
        return Endpoints.load(json.loads(told.read_text(encoding="utf-8"))["endpoints"])


def running(number: int) -> bool:
    """Return whether a process runs: one that has ended, and that nobody has asked about, does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@functools.lru_cache(maxsize=1)
def _own() -> Run:
    """Return the run of a process that is not part of any."""
    run = Run()
    atexit.register(run.close)
    return run
