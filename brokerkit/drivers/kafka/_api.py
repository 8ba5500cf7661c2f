"""Requests: which versions of Kafka's protocol are spoken, and how they travel on aiokafka's connections.

One version of each request, spoken by every broker from 3.1 on.  The schemas are Kafka's own, generated (package kio).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Protocol, TypeAlias, cast

from kio.index import load_response_from_request
from kio.schema.request_header.v1.header import RequestHeader as HeaderV1
from kio.schema.request_header.v2.header import RequestHeader as HeaderV2
from kio.serial import entity_reader, entity_writer
from kio.static.primitive import i16, i32
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

Versions: TypeAlias = Mapping[int, tuple[int, int]]
"""What a broker speaks: lowest and highest version by API key."""


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


@cache
def _writer(kind: type[Any]) -> Callable[[Any, Any], None]:
    return cast("Callable[[Any, Any], None]", entity_writer(kind))


@cache
def _reader(kind: type[Any]) -> Callable[[bytes, int], Sized]:
    return cast("Callable[[bytes, int], Sized]", entity_reader(kind))


class _Header:
    """What the connection wants of a header: `encode`, or the number that an answer belongs to."""

    __slots__ = ("correlation_id", "data")

    def __init__(self, correlation_id: int, data: bytes) -> None:
        self.correlation_id = correlation_id
        self.data = data

    def encode(self) -> bytes:
        return self.data


class _Answer:
    """How answers to one kind of request are read."""

    def __init__(self, request: type[Any]) -> None:
        response: Any = load_response_from_request(request)
        self.flexible_header: bool = response.__header_schema__.__flexible__
        self._read = _reader(response)

    def decode(self, frame: io.BytesIO) -> object:
        return self._read(frame.getvalue(), frame.tell())[0]


_answer = cache(_Answer)


class Request:
    """A request as aiokafka's connection wants one: it asks for `prepare`, a header, `encode` and how to read the answer."""

    __slots__ = ("RESPONSE_TYPE", "_body", "_entity")

    def __init__(self, entity: RequestPayload) -> None:
        self._entity: Any = entity
        self.RESPONSE_TYPE = _answer(type(entity))
        buffer = io.BytesIO()
        _writer(type(entity))(buffer, entity)
        self._body = buffer.getvalue()

    def prepare(self, versions: Versions) -> Request:
        """Return what is sent; `check` has looked at the versions when the connection was made."""
        return self

    def build_request_header(self, correlation_id: int, client_id: str) -> _Header:
        """Return the header of this very request."""
        entity = self._entity
        kind: Any = entity.__header_schema__
        assert kind is HeaderV2 or kind is HeaderV1
        header = kind(
            request_api_key=entity.__api_key__,
            request_api_version=i16(entity.__version__),
            correlation_id=i32(correlation_id),
            client_id=client_id,
        )
        buffer = io.BytesIO()
        _writer(kind)(buffer, header)
        return _Header(correlation_id, buffer.getvalue())

    def encode(self) -> bytes:
        """Return the body."""
        return self._body

    def parse_response_header(self, frame: io.BytesIO) -> _Header:
        """Read the number of the request that *frame* answers."""
        number = int.from_bytes(frame.read(4), "big", signed=True)
        if self.RESPONSE_TYPE.flexible_header:
            for _ in range(_varint(frame)):  # tagged fields
                _varint(frame)
                frame.seek(_varint(frame), io.SEEK_CUR)
        return _Header(number, b"")


def _varint(frame: io.BytesIO) -> int:
    number = shift = 0
    while True:
        (byte,) = frame.read(1)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
        shift += 7
