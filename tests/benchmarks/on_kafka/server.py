"""The Kafka that is measured on: one broker, without the topics of what was measured before."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any, Final

from ..frame import Backend

PREFIX: Final = "bench"
"""What the names of all topics begin with that measuring makes."""
JVM: Final = ("-XX:TieredStopAtLevel=4", "-Xms1g", "-Xmx1g")
"""Unlike the brokers of the tests, this one is to be as fast as it can be; the heap is that of Kafka's own start script."""
SHARING: Final = {
    "group.share.min.heartbeat.interval.ms": "5000",
    "group.share.heartbeat.interval.ms": "5000",
    "group.share.min.session.timeout.ms": "45000",
    "group.share.session.timeout.ms": "45000",
    "group.share.min.record.lock.duration.ms": "15000",
    "group.share.record.lock.duration.ms": "30000",
    "group.share.assignment.interval.ms": "1000",
    "group.share.initialize.retry.interval.ms": "30000",
}
"""What Kafka has by default, where the brokers of the tests are more in a hurry."""
ESTABLISHED: Final = "01"
_running: Final[dict[str, int]] = {}


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Start a broker and yield its URL."""
    from ...servers.kafka import KafkaCluster

    with KafkaCluster(jvm=JVM, config=SHARING) as cluster:
        url = cluster.endpoints.url()
        _running[url] = cluster.pid()
        yield url


def pid(url: str) -> int:
    """Return which process serves *url*."""
    return _running[url]


def bootstrap(url: str) -> str:
    """Return host and port as Kafka's clients take them."""
    return url.removeprefix("kafka://")


def _port(url: str) -> int:
    return int(bootstrap(url).rpartition(":")[2])


def wire(url: str) -> Any:
    """Connect as the administrator."""
    # Not in the processes that are measured: it brings much along.
    from ...servers.kafka import Wire

    return Wire(_port(url))


def clean(url: str) -> None:
    """Delete what was measured before."""
    with wire(url) as admin:
        if topics := [name for name in admin.cluster(None).topics if name.startswith(PREFIX)]:
            admin.delete(topics)


def connections(url: str) -> int:
    """Return how many clients are connected."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table]
    # Of each connection this machine has both ends.
    return sum(row[1].endswith(f":{_port(url):04X}") and row[3] == ESTABLISHED for row in rows)


def version() -> str:
    """Return what is measured on."""
    from ...servers.kafka import VERSIONS
    from ...servers.kafka.programs import java

    told = subprocess.run([java(), "-version"], capture_output=True, text=True, check=True).stderr
    return f"Kafka {VERSIONS[0]}, one broker, {told.splitlines()[0]}"


KAFKA: Final = Backend(name="kafka", serve=serve, clean=clean)
