"""Kafka's jars, the Java that runs them, and what makes it start quickly: fetched and made once, kept outside of the work tree."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from ..programs import Missing, install

Version: TypeAlias = Literal["4.3.1", "4.2.1", "3.9.2"]
VERSIONS: Final[tuple[Version, ...]] = get_args(Version)
OLDEST_JAVA: Final = 17
HERE: Final = Path(__file__).parent

JVM: Final = (
    "-Xms96m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:-UsePerfData",
    "-Djava.net.preferIPv4Stack=true", "-Djava.awt.headless=true",
)  # fmt: skip
"""A broker of the tests is small and soon gone: it starts quickly rather than to be as fast as it can be."""


@functools.lru_cache(maxsize=1)
def java() -> str:
    """Return the path of a Java from 17 on; Debian's is installed if there is none and that is allowed.

    Raises:
        Missing: there is none, and none could be installed.
    """
    found = _java()
    if found is None and _may_install():
        install("default-jre-headless", "java")
        found = _java()
    if found is None:
        raise Missing(
            "the tests need Java 17 or later for Kafka: install it (Debian: apt-get install default-jre-headless) and run them again"
        )
    told = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr
    major = re.search(r'version "(\d+)', told)
    if major is None or int(major[1]) < OLDEST_JAVA:
        raise Missing(
            f"the tests need Java 17 or later for Kafka; {found} is {told.splitlines()[0] if told else 'broken'}"
        )
    return found


def jars(version: Version) -> Path:
    """Return the folder of that Kafka's jars, fetched by Maven the first time.

    Raises:
        Missing: they could not be fetched.
    """
    return _kept(f"kafka-{version}", lambda folder: _fetch(version, folder))


def classpath(version: Version) -> str:
    """Return the jars as Java takes them."""
    return ":".join(sorted(str(path) for path in jars(version).glob("*.jar")))


def archive(version: Version) -> Path | None:
    """Return the classes of a broker as this Java maps them into memory, once `prepare` has made them."""
    found = _archive(version)
    return found if found.exists() else None


def formatted(version: Version, key: str, make: Callable[[Path], None]) -> Path:
    """Return a folder with the storage of a broker that never ran; *make* formats one if there is none for *key*."""
    name = hashlib.sha256(f"{version} {key}".encode()).hexdigest()[:16]
    return _kept(f"kafka-format-{name}", make)


def prepare(run: Callable[[Version, tuple[str, ...]], None]) -> None:
    """Fetch what brokers need and make their archives of classes, by *run*: a broker's start and end with those options.

    Raises:
        Missing: something is missing.
    """
    for version in VERSIONS:
        jars(version)
        made = _archive(version)
        if made.exists():
            continue
        java()
        with _locked(made.name):
            if not made.exists():
                half = made.with_suffix(f".{os.getpid()}")
                try:
                    run(version, (f"-XX:ArchiveClassesAtExit={half}",))
                    half.rename(made)
                finally:
                    half.unlink(missing_ok=True)


def cache() -> Path:
    """Return where all of it is kept: in the user's cache, as other tools do."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brokerkit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _archive(version: Version) -> Path:
    """Return where the archive of this Java is to be; Java itself refuses that of another."""
    program = os.path.realpath(_java() or java())
    told = hashlib.sha256(f"{program} {os.stat(program).st_mtime_ns} {JVM}".encode()).hexdigest()[:12]
    return cache() / f"kafka-{version}-{told}.jsa"


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    with (cache() / f"{name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; the first process that needs it fills it, and it is there when it is whole."""
    folder = cache() / name
    if not folder.exists():
        with _locked(name):
            if not folder.exists():
                with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=cache()) as half:
                    made = Path(half) / "made"
                    made.mkdir()
                    make(made)
                    made.rename(folder)
    return folder


def _fetch(version: Version, folder: Path) -> None:
    java()
    maven = shutil.which("mvn")
    if maven is None and _may_install():
        install("maven", "mvn")
        maven = shutil.which("mvn")
    if maven is None:
        raise Missing(
            "the tests need Maven to fetch Kafka: install it (Debian: apt-get install maven) and run them again"
        )
    print(f"fetching Kafka {version} ...", flush=True)
    options = [f"-Dkafka.version={version}", "-DincludeScope=runtime", f"-DoutputDirectory={folder}"]
    command = [maven, "-q", "-B", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not any(folder.glob("kafka_*.jar")):
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line] or ["it says nothing"]
        raise Missing(f"the tests need Kafka {version}, and Maven cannot fetch it: {said[0]}")


def _java() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")


def _may_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None
