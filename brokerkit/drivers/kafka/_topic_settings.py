"""The settings that topics have in the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, cast

from kio.schema.describe_configs.v4 import request as requests
from kio.schema.errors import ErrorCode

from ...address import AnyQueue
from ...errors import AuthorizationError
from ._cluster import PAUSE, Cluster
from ._errors import RETRY, of_code

logger = logging.getLogger("brokerkit")

RETENTION: Final = "retention.ms"
LEASE: Final = "delete.retention.ms"
"""Where the lease of a queue is written down: for a topic that is not compacted it means nothing else."""
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
_TOPIC: Final = 2
"""A topic, among the kinds of things that have settings."""
_OWN: Final = 1
"""Where a setting is from that was made for this topic."""


async def topic_settings(
    cluster: Cluster, name: str, names: Sequence[str], *, timeout: float, own: bool = False
) -> dict[str, str]:
    """Return those of *names* that topic *name* has, as they count; with *own* only those that were made for it.

    Raises:
        AuthorizationError: its settings may not be read.
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    entity: Any = requests
    request = entity.DescribeConfigsRequest(
        resources=(
            entity.DescribeConfigsResource(resource_type=_TOPIC, resource_name=name, configuration_keys=tuple(names)),
        )
    )
    while True:
        answer = await cluster.call(None, request, timeout=max(PAUSE, end - loop.time()))
        (result,) = answer.results
        code = cast("ErrorCode", result.error_code)
        if code is ErrorCode.none:
            return {
                str(config.name): str(config.value)
                for config in result.configs
                if config.value is not None and (not own or config.config_source == _OWN)
            }
        error = of_code(int(code), f"DESCRIBE_CONFIGS on topic {name}", result.error_message)
        if code not in RETRY or loop.time() > end:
            raise error
        await asyncio.sleep(PAUSE)


async def check_queue(cluster: Cluster, queue: AnyQueue, *, timeout: float) -> None:
    """Warn if the topic of *queue* was made by others, with settings that a queue should not have, as far as that may be read.

    Raises:
        NotFound: there is no such topic.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    try:
        found = await topic_settings(cluster, queue.name, tuple(_WANTED), timeout=timeout)
    except AuthorizationError as error:
        logger.debug("%r: the settings of its topic are not known: %s", queue, error)
        return
    for name, wanted in _WANTED.items():
        if (value := found.get(name, wanted)) != wanted:
            logger.warning(
                "%r: its topic has %s=%s, so %s; a queue's topic should have %s", queue, name, value, _WHY[name], wanted
            )
