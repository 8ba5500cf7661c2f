"""The settings that topics have in the cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...address import AnyQueue, AnyTopic
from ...errors import AuthorizationError, SettingsMismatch
from ...policy import MAX_BODY
from ._cluster import Cluster
from ._configs import TOPIC, configs

logger = logging.getLogger("brokerkit")

RETENTION: Final = "retention.ms"
LEASE: Final = "delete.retention.ms"
"""Where the lease of a queue is written down: for a topic that is not compacted it means nothing else."""
LARGEST: Final = MAX_BODY + 65536
"""``max.message.bytes`` of a topic: a body of the largest size with its key and headers, where Kafka's default is 1 MiB."""
_BYTES: Final = "max.message.bytes"
_SIZE: Final = "retention.bytes"
_TIMES: Final = "message.timestamp.type"
_POLICY: Final = "cleanup.policy"
_WANTED: Final = {_TIMES: "LogAppendTime", RETENTION: "-1", _SIZE: "-1", _POLICY: "delete"}
"""What the topic of a queue has."""
_WHY: Final = {
    _TIMES: "delays and times to live go by the clocks of publishers",
    RETENTION: "messages that wait longer are lost",
    _SIZE: "messages are lost when more of them wait",
    _POLICY: "messages are lost that have the same key",
}
_OWN: Final = 1
"""Where a setting is from that was made for this topic."""


async def _settings_of(cluster: Cluster, name: str, names: Sequence[str], timeout: float) -> dict[str, Any]:
    """Return those of *names* that topic *name* has, as they count.

    Raises:
        AuthorizationError: its settings may not be read.
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    return await configs(cluster, TOPIC, name, names, f"topic {name}", timeout)


async def retention_of(cluster: Cluster, topic: AnyTopic, shown: str, *, timeout: float) -> int:
    """Return for how many milliseconds *topic* keeps its records, -1 for ever.

    Raises:
        SettingsMismatch: it is a queue; *shown* is the cluster.
        AuthorizationError: its settings may not be read.
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    found = await _settings_of(cluster, topic.name, (RETENTION, LEASE), timeout)
    if _own(found, LEASE) is not None:
        raise _other_kind(topic, shown)
    return int(found[RETENTION].value or -1) if RETENTION in found else -1


async def lease_at_birth(cluster: Cluster, queue: AnyQueue, shown: str, *, timeout: float) -> float | None:
    """Return the lease that *queue* was made with, in its own words if it is the same; None if others have made its topic.

    Raises:
        SettingsMismatch: it is a topic; *shown* is the cluster.
        AuthorizationError: its settings may not be read.
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    found = await _settings_of(cluster, queue.name, (LEASE, _BYTES), timeout)
    lease = _own(found, LEASE)
    if lease is None:
        if _own(found, _BYTES) == str(LARGEST):
            raise _other_kind(queue, shown)
        return None
    return queue.lease if round(queue.lease * 1000) == int(lease) else int(lease) / 1000


async def check_queue(cluster: Cluster, queue: AnyQueue, shown: str, *, timeout: float) -> None:
    """Warn if the topic of *queue* was made by others, with settings that a queue should not have, as far as that may be read.

    Raises:
        SettingsMismatch: it is a topic; *shown* is the cluster.
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    try:
        found = await _settings_of(cluster, queue.name, (*_WANTED, LEASE, _BYTES), timeout)
    except AuthorizationError as error:
        logger.debug("%r: the settings of its topic are not known: %s", queue, error)
        return
    if _own(found, LEASE) is None and _own(found, _BYTES) == str(LARGEST):
        raise _other_kind(queue, shown)
    for name, wanted in _WANTED.items():
        if name in found and (value := found[name].value) != wanted:
            logger.warning(
                "%r: its topic has %s=%s, so %s; a queue's topic should have %s", queue, name, value, _WHY[name], wanted
            )


def _own(found: Mapping[str, Any], name: str) -> str | None:
    """Return a setting that was made for the topic."""
    return found[name].value if name in found and found[name].config_source == _OWN else None


def _other_kind(address: AnyTopic | AnyQueue, shown: str) -> SettingsMismatch:
    return SettingsMismatch(f"{address!r}: that name is another kind of address on {shown}")
