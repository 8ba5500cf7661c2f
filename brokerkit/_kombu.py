"""What Kombu imports in every process that uses Celery: the names of our transport, and a serializer.

Kombu loads the entry points of the group ``kombu.serializers`` when it is imported, so that ``kafka://`` is brokerkit's
without a line of code that says so.  This file is installed as `_brokerkit_kombu`, outside of the package: importing a
part of brokerkit would import all of it, in processes too that never use it.  For the same reason nothing is imported
here that Kombu has not imported.

``BROKERKIT_CELERY_TAKEOVER`` lists the schemes of Kombu's that become brokerkit's, separated by commas: ``kafka`` if it
is not set, none if it is empty.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from kombu import transport

__all__ = ["serializer"]

_kombu: Any = transport
_TRANSPORT = "brokerkit.celery.transport:Transport"
_STOCK = "kombu.transport.confluentkafka:Transport"
_OURS = ("", "+memory", "+redis", "+rediss", "+redis+unix", "+redis+socket", "+kafka", "+kafka+ssl")
"""Kombu takes what follows the first ``+`` for the host, but all of it for the scheme when it goes on to another host."""


def _kafka() -> str:
    """Return who serves ``kafka://``: stock Celery, where it can and brokerkit lacks its client library."""
    stock = find_spec("kio") is None and find_spec("confluent_kafka") is not None
    return _STOCK if stock else _TRANSPORT


_THEIRS: Mapping[str, Mapping[str, str | Callable[[], str]]] = {
    "kafka": {"kafka": _kafka, "kafka+ssl": _kafka},
    "confluentkafka": {"confluentkafka": _TRANSPORT},
    "redis": {"redis": _TRANSPORT, "redis+unix": _TRANSPORT, "redis+socket": _TRANSPORT},
    "rediss": {"rediss": _TRANSPORT},
    "memory": {"memory": _TRANSPORT},
}


def _name(aliases: Mapping[str, str | Callable[[], str]]) -> None:
    _kombu.TRANSPORT_ALIASES.update(aliases)
    for alias in aliases:
        _kombu._transport_cache.pop(alias, None)  # it was resolved before


def _take_over() -> None:
    for scheme in os.environ.get("BROKERKIT_CELERY_TAKEOVER", "kafka").split(","):
        if (wanted := scheme.strip().removesuffix("://")) in _THEIRS:
            _name(_THEIRS[wanted])
        elif wanted:
            warnings.warn(
                f"BROKERKIT_CELERY_TAKEOVER: there is no {wanted!r} to take over, only {', '.join(_THEIRS)}",
                RuntimeWarning,
                stacklevel=1,
            )


_name({f"brokerkit{scheme}": _TRANSPORT for scheme in _OURS})
_take_over()
if "celery" in sys.modules:
    from celery import concurrency  # a dict and little else, which is read before any app is imported

    _pools: Any = concurrency
    _pools.ALIASES.setdefault("brokerkit", "brokerkit.celery.pool:TaskPool")


_MORE = re.compile(r'"__type__"|[0-9]{19}')
"""In a text that has a value whose type JSON has not, or an integer that orjson would make a float of."""


def _json() -> Any:
    from kombu.utils import json

    return json


def _encode(data: object) -> bytes:
    import orjson

    json = _json()
    try:
        return orjson.dumps(data, default=json.JSONEncoder().default, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # what orjson refuses and Kombu does not: integers of more than 64 bits, keys that are no text
        text: str = json.dumps(data)
        return text.encode()


def _decode(data: bytes | str) -> object:
    import orjson

    text = data if isinstance(data, str) else bytes(data).decode()
    if not _MORE.search(text):
        try:
            return orjson.loads(text)
        except ValueError:  # what Python's JSON has besides, such as NaN
            pass
    value: object = _json().loads(text)
    return value


serializer = (_encode, _decode, "application/x-orjson", "utf-8")
"""The serializer ``orjson``: Kombu's ``json`` several times as fast.  A UUID arrives as a text, NaN as None."""
