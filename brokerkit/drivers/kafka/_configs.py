"""Settings that brokers keep, of topics, groups and themselves: reading them, and asking until a broker has an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from kio.schema.errors import ErrorCode

from ._api import schema
from ._cluster import PAUSE, Cluster, loop_time, time_left
from ._errors import RETRY, of_code

TOPIC: Final = 2
BROKER: Final = 4
GROUP: Final = 32
"""The kinds of things that have settings."""

_requests = schema("DescribeConfigs")


async def configs(
    cluster: Cluster,
    kind: int,
    name: str,
    names: Sequence[str] | None,
    what: str,
    timeout: float,
    node: int | None = None,
) -> dict[str, Any]:
    """Return those of *names*, or all, that *name* has, by name; *node* is asked, or any broker.

    Raises:
        AuthorizationError: they may not be read.
        NotFound: there is no such thing.
        BrokerUnavailable: no answer within *timeout* seconds.
    """
    wanted = None if names is None else tuple(names)
    resource = _requests.DescribeConfigsResource(resource_type=kind, resource_name=name, configuration_keys=wanted)
    request = _requests.DescribeConfigsRequest(resources=(resource,))
    answer = await insist(cluster, request, _result, f"DESCRIBE_CONFIGS on {what}", timeout, node)
    return {str(config.name): config for config in _result(answer).configs}


def _result(answer: Any) -> Any:
    (result,) = answer.results
    return result


async def insist(
    cluster: Cluster, request: object, part: Callable[[Any], Any], what: str, timeout: float, node: int | None = None
) -> Any:
    """Return the answer of *node*, or of any broker; *part* picks what has an error code and what was said beside it.

    Raises:
        BrokerError: it is an error, and none that goes away by itself within *timeout* seconds.
    """
    end = loop_time() + timeout
    while True:
        answer = await cluster.call(node, request, timeout=time_left(end))
        one = part(answer)
        if one.error_code is ErrorCode.none:
            return answer
        if one.error_code not in RETRY or loop_time() > end:
            raise of_code(int(one.error_code), what, one.error_message)
        await asyncio.sleep(PAUSE)
