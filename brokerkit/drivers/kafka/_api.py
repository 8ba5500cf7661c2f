"""Requests: which versions of Kafka's protocol are spoken, and how they look as bytes.

One version of each request, spoken by every broker from 3.1 on.  The schemas are Kafka's own, generated (package kio).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final, Protocol, TypeAlias, cast

from kio.serial import entity_reader, entity_writer
from kio.static.protocol import RequestPayload

from ...errors import ConfigError

OLDEST: Final = "3.1"
"""The oldest Kafka that has all of these versions."""
SPOKEN: Final[Mapping[int, tuple[str, int]]] = {
    0: ("Produce", 9),
    1: ("Fetch", 13),
    2: ("ListOffsets", 7),
    3: ("Metadata", 12),
    8: ("OffsetCommit", 8),
    9: ("OffsetFetch", 7),
    10: ("FindCoordinator", 3),
    11: ("JoinGroup", 7),
    12: ("Heartbeat", 4),
    13: ("LeaveGroup", 4),
    14: ("SyncGroup", 5),
    15: ("DescribeGroups", 5),
    16: ("ListGroups", 4),
    19: ("CreateTopics", 7),
    20: ("DeleteTopics", 5),
    21: ("DeleteRecords", 2),
    22: ("InitProducerId", 4),
    32: ("DescribeConfigs", 4),
    42: ("DeleteGroups", 2),
}
"""Name and version by API key."""
OFFERED: Final[Mapping[int, tuple[str, int]]] = {
    44: ("IncrementalAlterConfigs", 1),
    76: ("ShareGroupHeartbeat", 1),
    77: ("ShareGroupDescribe", 1),
    78: ("ShareFetch", 2),
    79: ("ShareAcknowledge", 2),
    90: ("DescribeShareGroupOffsets", 1),
    91: ("AlterShareGroupOffsets", 0),
    92: ("DeleteShareGroupOffsets", 0),
}
"""The same for what is spoken where the broker does: share groups, as Kafka has them from 4.2 on."""
LOG_IN: Final[Mapping[int, tuple[str, int]]] = {17: ("SaslHandshake", 1), 36: ("SaslAuthenticate", 2)}
"""The same for what is spoken where the URL has a password."""

Versions: TypeAlias = Mapping[int, tuple[int, int]]
"""What a broker speaks: lowest and highest version by API key."""

_versions: Final[dict[str, int]] = dict((*SPOKEN.values(), *OFFERED.values(), *LOG_IN.values()))
_CLIENT: Final = b"brokerkit"
"""What brokers are told that we are; their logs, metrics and quotas show it."""
_HEAD: Final = struct.Struct(">ihhih")
_RANGE: Final = struct.Struct(">hhh")
_CODE: Final = struct.Struct(">h")


class Sized(Protocol):
    """What a reader returns: the entity and how many bytes it took."""

    def __getitem__(self, index: int, /) -> Any: ...


def check(versions: Versions, broker: str) -> None:
    """Refuse a broker that does not speak what is spoken here.

    Raises:
        ConfigError: it is too old, or too new.
    """
    for key, (name, version) in SPOKEN.items():
        low, high = versions.get(key, (0, -1))
        if not low <= version <= high:
            offered = f"{low} to {high}" if high >= 0 else "none"
            raise ConfigError(
                f"{broker} does not speak version {version} of {name} (it speaks {offered}); "
                f"brokerkit needs Kafka {OLDEST} or newer"
            )


def offers(versions: Versions) -> bool:
    """Return whether a broker speaks what share groups take; they may be switched off all the same."""
    return all(
        low <= version <= high for key, (_, version) in OFFERED.items() for low, high in [versions.get(key, (0, -1))]
    )


class _Schema:
    """The entities of a request, or of its answer, imported when the first of them is asked for.

    All of them take 3 MiB in every process that a pool forks, and no process asks for all.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        entity = getattr(import_module(self._module), name)
        setattr(self, name, entity)
        return entity


def schema(name: str, kind: str = "request") -> Any:
    """Return what has the entities of request *name*, in the version that is spoken; of its answer if *kind* is "response".

    The schemas have number types of their own, which plain numbers satisfy.
    """
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return _Schema(f"kio.schema.{words}.v{_versions[name]}.{kind}")


@cache
def _writer(kind: type[Any]) -> Callable[[Any, Any], None]:
    return cast("Callable[[Any, Any], None]", entity_writer(kind))


@cache
def _answer(kind: type[Any]) -> tuple[bool, Callable[[bytes, int], Sized]]:
    """Return how the answer to a request is read: whether there may be tagged fields before it, and by what."""
    module = import_module(f"{kind.__module__.removesuffix('request')}response")
    response = getattr(module, f"{kind.__name__.removesuffix('Request')}Response")
    return response.__header_schema__.__flexible__, cast("Callable[[bytes, int], Sized]", entity_reader(response))


class Asking(Protocol):
    """A request as a connection takes one."""

    @property
    def name(self) -> str:
        """What Kafka calls it, for texts."""
        ...

    def frame(self, number: int, /) -> bytes:
        """Return what is sent, with its size before it; the answer carries *number*."""
        ...

    def read(self, frame: bytes, /) -> Any:
        """Return the answer in *frame*, which is without its size."""
        ...


def framed(key: int, version: int, number: int, body: bytes, *, flexible: bool = True) -> bytes:
    """Return a request as it is sent."""
    size = len(body) + len(_CLIENT) + (11 if flexible else 10)
    head = _HEAD.pack(size, key, version, number, len(_CLIENT))
    return b"".join((head, _CLIENT, b"\0" if flexible else b"", body))


def answer_at(frame: bytes) -> int:
    """Return where the answer in *frame* begins, behind its number and tagged fields."""
    return _past_tags(frame, 4)


def _past_tags(frame: bytes, at: int) -> int:
    """Return where tagged fields end, of which none means anything to us."""
    count, at = _number(frame, at)
    for _ in range(count):
        _, at = _number(frame, at)
        size, at = _number(frame, at)
        at += size
    return at


def _number(frame: bytes, at: int) -> tuple[int, int]:
    """Return a number, and where it ends."""
    number = shift = 0
    while True:
        byte = frame[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


def varint(number: int) -> bytes:
    """Return *number* as what says how long something is."""
    if number < 128:
        return _SMALL[number]
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    packed.append(number)
    return bytes(packed)


_SMALL: Final = tuple(bytes([number]) for number in range(128))


class Request:
    """A request that Kafka's schemas describe."""

    __slots__ = ("_body", "_kind")

    def __init__(self, entity: RequestPayload) -> None:
        self._kind: Any = type(entity)
        buffer = io.BytesIO()
        _writer(self._kind)(buffer, entity)
        self._body = buffer.getvalue()

    def __repr__(self) -> str:
        return f"<Request {self.name}>"

    @property
    def name(self) -> str:
        """What Kafka calls it."""
        name: str = self._kind.__name__
        return name.removesuffix("Request")

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        kind = self._kind
        return framed(kind.__api_key__, kind.__version__, number, self._body, flexible=kind.__flexible__)

    def read(self, frame: bytes, /) -> Any:
        """Return the answer, as its schema has it."""
        flexible, read = _answer(self._kind)
        return read(frame, answer_at(frame) if flexible else 4)[0]


class Hello:
    """The first request: what does the broker speak?  Its answer is an error code and the `Versions`.

    It is read by hand: a later broker may say more about itself than the schemas know, and an old one answers in an older form.
    """

    __slots__ = ("_body",)

    name = "ApiVersions"

    def __init__(self, version: str) -> None:
        self._body = b"".join((*(bytes([len(text) + 1]) + text for text in (_CLIENT, version.encode())), b"\0"))

    def frame(self, number: int, /) -> bytes:
        """Return what is sent."""
        return framed(18, 3, number, self._body)

    def read(self, frame: bytes, /) -> tuple[int, Versions]:
        """Return error code and versions; there are none if the code is not 0."""
        (code,) = _CODE.unpack_from(frame, 4)
        versions: dict[int, tuple[int, int]] = {}
        if not code:
            count, at = _number(frame, 6)
            for _ in range(count - 1):
                key, low, high = _RANGE.unpack_from(frame, at)
                versions[key] = (low, high)
                at = _past_tags(frame, at + _RANGE.size)
        return code, versions
