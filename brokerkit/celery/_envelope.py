"""Kombu's messages as bytes: the JSON object that its virtual transports store too."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, cast

import msgspec
import orjson
from kombu.utils import json as kombu_json

from ..errors import DecodeError, EncodeError

JSON: Final = "application/json"
TOP_PRIORITY: Final = 9
_OURS: Final = b'{"body":"'
"""How the text begins that is read the fast way.  Kombu's own writer puts a space behind the colon: what only that can write,
such as numbers of more than 64 bits, only Kombu's own reader reads."""
_BODIES: Final = frozenset((str, bytes, list, dict))
_LIMITS: Final = frozenset((int, float, type(None)))
_TYPED: Final = b'"__type__"'
_encoder: Any = kombu_json.JSONEncoder()
_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS


class Envelope(
    msgspec.Struct, kw_only=True, rename={"content_type": "content-type", "content_encoding": "content-encoding"}
):
    """A message as Celery stores it in its queues.

    *body* is what Celery's serializer wrote, ``[args, kwargs, embed]`` of a task; where that is no text it is in base64, and
    *properties* say so (``"body_encoding": "base64"``).  *headers* tell the task's name and id, *properties* what Kombu needs.
    """

    body: str
    content_type: str | None = JSON
    content_encoding: str | None = "utf-8"
    headers: dict[str, Any] = {}
    properties: dict[str, Any] = {}


class Frame:
    """A message on its way out."""

    __slots__ = ("body", "eta", "exchange", "lasting", "priority", "routing_key", "task", "ttl", "type")

    def __init__(
        self,
        exchange: str,
        type: str,
        routing_key: str,
        body: bytes,
        eta: float | None,
        ttl: float | None,
        priority: int,
        task: bool,
        lasting: bool,
    ) -> None:
        self.exchange = exchange
        self.type = type
        self.routing_key = routing_key
        self.body = body
        self.eta = eta
        """When it is due, in seconds since the epoch."""
        self.ttl = ttl
        self.priority = priority
        self.task = task
        self.lasting = lasting
        """Whether its sender wants it to be kept: AMQP's delivery mode 2, Kombu's default."""


def seal(message: Mapping[str, Any], exchange: str, type: str, routing_key: str) -> Frame:
    """Return *message*, as Kombu prepared it, ready to be published.

    What is a task is not dropped when its time is over: then the worker would not say that it was revoked.

    Raises:
        EncodeError: a header or property is no JSON.
    """
    headers, properties = message["headers"], message["properties"]
    eta = expires = None
    task = False
    if headers:
        task = "task" in headers
        if headers.get("eta"):
            eta = due(headers["eta"])
    if not task and properties.get("expiration"):
        expires = _expiration(properties["expiration"])
    priority = properties.get("priority")
    if priority:
        priority = level(priority)
    lasting = properties.get("delivery_mode") == 2
    return Frame(exchange, type, routing_key, pack(message), eta, expires, priority or 0, task, lasting)


def pack(message: Mapping[str, Any]) -> bytes:
    """Return *message* as bytes."""
    body = message.get("body")
    headers, properties = message.get("headers"), message["properties"]
    if body.__class__ is not str:
        body, encoding = _text_of(body, message.get("content-encoding"), headers)
        if encoding is not None:
            properties = {**properties, "body_encoding": encoding}
    stored = {
        "body": body,
        "content-type": message.get("content-type"),
        "content-encoding": message.get("content-encoding"),
        "headers": headers or {},
        "properties": properties,
    }
    try:
        return orjson.dumps(stored, default=_encoder.default, option=_OPTIONS)
    except TypeError:  # keys that are no text, numbers of more than 64 bits, lone surrogates: slower, and the same
        try:
            return cast(str, kombu_json.dumps(stored)).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError) as error:
            raise EncodeError(f"a header or property of the message is no JSON: {error}") from error


def _text_of(body: object, encoding: object, headers: Mapping[str, Any] | None) -> tuple[object, str | None]:
    """Return *body* as text, and how it was made text of."""
    if not isinstance(body, (bytes, bytearray, memoryview)):
        return body, None
    data = bytes(body)
    if (
        isinstance(encoding, str)
        and encoding.lower() in ("utf-8", "us-ascii")
        and not (headers or {}).get("compression")
    ):
        try:
            return data.decode("utf-8"), None
        except UnicodeDecodeError:
            pass
    return base64.b64encode(data).decode("ascii"), "base64"


def unseal(body: bytes) -> dict[str, Any]:
    """Return the message that `pack` made *body* of, with its own body as it was.

    Raises:
        DecodeError: it is no message of Kombu.
    """
    try:
        if body.startswith(_OURS) and _TYPED not in body:
            payload: Any = orjson.loads(body)
        else:
            payload = kombu_json.loads(body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"no message of Celery: {error}") from error
    if payload.__class__ is not dict:
        raise DecodeError("no message of Celery: no JSON object")
    properties = payload.get("properties")
    if properties.__class__ is not dict or "body" not in payload:
        raise DecodeError("no message of Celery: 'properties' or 'body' is missing")
    headers = payload.get("headers")
    if headers.__class__ is not dict:
        if headers is not None:
            raise DecodeError("no message of Celery: 'headers' is no JSON object")
        payload["headers"] = {}
    payload.setdefault("content-type", None)
    payload.setdefault("content-encoding", None)
    if "body_encoding" in properties:
        encoding = properties.pop("body_encoding")
        if encoding == "base64":
            try:
                payload["body"] = base64.b64decode(payload["body"], validate=True)
            except (TypeError, ValueError) as error:
                raise DecodeError("no message of Celery: its body is no base64") from error
    for name in ("content-type", "content-encoding"):
        if payload[name].__class__ is not str and payload[name] is not None:
            raise DecodeError(f"no message of Celery: {name!r} is no text")
    if payload["body"].__class__ not in _BODIES:
        raise DecodeError("no message of Celery: its body is no text")
    info = properties.get("delivery_info")
    if info.__class__ is not dict:
        properties["delivery_info"] = {}
    return cast("dict[str, Any]", payload)


def check_task(headers: Mapping[str, Any]) -> None:
    """Look at those of *headers* over which a worker of Celery ends when they are something else.

    Raises:
        DecodeError: these are the headers of no task.
    """
    if headers["task"].__class__ is not str:
        raise DecodeError("no task of Celery: the header 'task' is no text")
    id = headers.get("id")
    if not id or id.__class__ not in (str, int):
        raise DecodeError("no task of Celery: it has no 'id' in its headers")
    limits = headers.get("timelimit")
    if limits and not (
        limits.__class__ is list and len(limits) == 2 and all(each.__class__ in _LIMITS for each in limits)
    ):
        raise DecodeError("no task of Celery: 'timelimit' in its headers is not two numbers")
    stamps, stamped = headers.get("stamps"), headers.get("stamped_headers")
    if (stamps and stamps.__class__ is not dict) or (stamped and stamped.__class__ is not list):
        raise DecodeError("no task of Celery: 'stamps' or 'stamped_headers' in its headers are none")


def redelivered(payload: dict[str, Any]) -> None:
    """Mark *payload*: it was delivered before.  Some read it here, some there."""
    payload["properties"]["delivery_info"]["redelivered"] = True
    payload["headers"]["redelivered"] = True


def due(eta: object) -> float | None:
    """Return when *eta*, a time in Celery's ``eta`` header, is, in seconds since the epoch; None if it is no time.

    Without a time zone it is UTC, as Celery reads it.
    """
    if isinstance(eta, str):
        try:
            eta = datetime.fromisoformat(eta)
        except ValueError:
            return None
    if not isinstance(eta, datetime):
        return None
    try:
        return (eta if eta.tzinfo is not None else eta.replace(tzinfo=UTC)).timestamp()
    except (OverflowError, ValueError):
        return None


def wait(eta: float | None, window: float) -> float:
    """Return how many seconds the broker keeps what is due at *eta*: until *window* seconds before."""
    return 0.0 if eta is None else max(0.0, eta - window - time.time())


def _expiration(value: object) -> float | None:
    """Return the seconds of AMQP's ``expiration``, which is milliseconds as a text."""
    try:
        return max(float(cast(Any, value)) / 1000, 0.001)
    except (TypeError, ValueError):
        return None


def level(value: object) -> int:
    """Return *value*, a message's ``priority``, as a number from 0 to 9."""
    try:
        return min(max(int(cast(Any, value)), 0), TOP_PRIORITY)
    except (TypeError, ValueError, OverflowError):
        return 0
