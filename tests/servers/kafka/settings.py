"""What is in ``server.properties``: one node of a cluster that is small, quick to notice a death, and quick to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias, get_args

Listener: TypeAlias = Literal["PLAIN", "SASL", "SSL", "MTLS", "SASLSSL"]
"""Plaintext; with a password; TLS; TLS with a client's certificate; TLS with a password."""
LISTENERS: Final[tuple[Listener, ...]] = get_args(Listener)
PROTOCOLS: Final[Mapping[str, str]] = {
    "CONTROLLER": "PLAINTEXT", "PLAIN": "PLAINTEXT", "SASL": "SASL_PLAINTEXT", "SSL": "SSL", "MTLS": "SSL", "SASLSSL": "SASL_SSL",
}  # fmt: skip
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
ADMIN: Final = "admin"
"""May do anything, as anybody may who comes without a name over plaintext: those are the brokers themselves."""

SMALL: Final[Mapping[str, str]] = {
    "num.network.threads": "2",
    "num.io.threads": "4",
    "num.replica.fetchers": "1",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "1",
    "group.coordinator.threads": "1",
    "log.cleaner.threads": "1",
    "log.cleaner.dedupe.buffer.size": "2097152",
    "log.segment.bytes": "67108864",
    "log.index.size.max.bytes": "65536",
    "metadata.max.idle.interval.ms": "0",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "2",
    "share.coordinator.state.topic.num.partitions": "2",
}
QUICK: Final[Mapping[str, str]] = {
    "broker.heartbeat.interval.ms": "250",
    "controlled.shutdown.max.retries": "1",
    "controller.quorum.append.linger.ms": "0",
    "log.segment.delete.delay.ms": "500",  # of topics that are deleted
    "log.retention.check.interval.ms": "500",
    "log.cleaner.backoff.ms": "200",
    "log.initial.task.delay.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "group.consumer.min.session.timeout.ms": "500",
    "group.consumer.session.timeout.ms": "5000",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "500",
    "group.consumer.assignment.interval.ms": "0",
    "group.share.min.session.timeout.ms": "500",
    "group.share.session.timeout.ms": "5000",
    "group.share.min.heartbeat.interval.ms": "200",
    "group.share.heartbeat.interval.ms": "500",
    "group.share.assignment.interval.ms": "0",
    "group.share.initialize.retry.interval.ms": "500",
    "group.share.min.record.lock.duration.ms": "1000",  # Kafka takes no less
    "group.share.record.lock.duration.ms": "3000",
}
"""Of what limits a share group (deliveries, locks, the window) a broker has what it comes with, as most operators leave it."""


def copies(nodes: int) -> Mapping[str, str]:
    """Return how often everything is stored, and how many of the copies a publish needs: two of three."""
    factor, least = min(3, nodes), max(1, min(3, nodes) - 1)
    settings = {"default.replication.factor": factor, "min.insync.replicas": least}
    for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
        settings[f"{topic}.replication.factor"] = factor
    settings["transaction.state.log.min.isr"] = settings["share.coordinator.state.topic.min.isr"] = least
    # A broker that was killed is let in again when its last session is over.
    settings["broker.session.timeout.ms"] = 2000
    return {name: str(value) for name, value in settings.items()}


def listening(node: int, ports: Mapping[int, Mapping[str, int]]) -> Mapping[str, str]:
    """Return where *node* of a cluster with those *ports* listens, as broker and as one of the controllers."""
    own = ports[node]
    return {
        "process.roles": "broker,controller",
        "node.id": str(node),
        "controller.quorum.voters": ",".join(f"{each}@127.0.0.1:{at['CONTROLLER']}" for each, at in ports.items()),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAIN",
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in PROTOCOLS.items()),
        "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in own.items()),
        "advertised.listeners": ",".join(f"{name}://127.0.0.1:{own[name]}" for name in own if name != "CONTROLLER"),
    }


def passwords(users: Mapping[str, str], mechanisms: Sequence[str]) -> Mapping[str, str]:
    """Return the settings of the listeners that ask for a password; those of SCRAM are stored when the node is formatted."""
    settings = {"sasl.enabled.mechanisms": ",".join(mechanisms)}
    known = " ".join(f'user_{name}="{password}"' for name, password in users.items())
    for listener in ("sasl", "saslssl"):
        plain = f"org.apache.kafka.common.security.plain.PlainLoginModule required {known};"
        settings[f"listener.name.{listener}.plain.sasl.jaas.config"] = plain
        for name in ("scram-sha-256", "scram-sha-512"):
            scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            settings[f"listener.name.{listener}.{name}.sasl.jaas.config"] = scram
    return settings


def certificates(folder: str) -> Mapping[str, str]:
    """Return the settings of the listeners with TLS, whose files are in *folder*."""
    settings: dict[str, str] = {}
    for listener in ("ssl", "mtls", "saslssl"):
        prefix = f"listener.name.{listener}.ssl"
        settings[f"{prefix}.keystore.type"] = settings[f"{prefix}.truststore.type"] = "PEM"
        settings[f"{prefix}.keystore.location"] = f"{folder}/keystore.pem"
        settings[f"{prefix}.truststore.location"] = f"{folder}/authority.pem"
        settings[f"{prefix}.client.auth"] = "required" if listener == "mtls" else "none"
    return settings


RIGHTS: Final[Mapping[str, str]] = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": f"User:ANONYMOUS;User:{ADMIN}",
}
"""Who is not allowed something is refused it."""
