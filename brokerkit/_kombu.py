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
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from kombu.transport import TRANSPORT_ALIASES, _transport_cache

__all__ = ["serializer"]

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
    TRANSPORT_ALIASES.update(aliases)
    for alias in aliases:
        _transport_cache.pop(alias, None)  # it was resolved before


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


def _encode(data: object) -> bytes:
    import orjson
    from kombu.utils.json import JSONEncoder, dumps

    try:
        return orjson.dumps(data, default=JSONEncoder().default, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # what orjson refuses and Kombu does not: integers of more than 64 bits, keys that are no text
        text: str = dumps(data)
        return text.encode()


def _decode(data: bytes | str) -> object:
    import orjson
    from kombu.utils.json import loads

    value: object
    if b"__type__" not in data if isinstance(data, bytes) else "__type__" not in data:
        try:
            value = orjson.loads(data)
        except ValueError:  # NaN, and integers of more than 64 bits, which Python's JSON has
            value = loads(data)
    else:
        value = loads(data)  # a value whose type JSON has not, such as a datetime
    return value


serializer = (_encode, _decode, "application/x-orjson", "utf-8")
"""The serializer ``orjson``: Kombu's ``json`` several times as fast.  A UUID arrives as a text, NaN as None."""
