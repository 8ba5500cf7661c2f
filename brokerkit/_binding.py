"""Addresses bound to a broker: checked against its backend once, then ready to make records.

Everything a user can get wrong about one message is found here, before any I/O.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from .address import Address, AnyQueue, DeadLetters, Outgoing, Queue, Topic, with_prefix
from .clock import Clock
from .codecs import BoundCodec, for_type
from .driver import Capabilities, Driver, Headers, Record
from .errors import AuthorizationError, BrokerError, CapabilityError, ConfigError, NotFound, SettingsMismatch, TooLarge
from .message import CONTENT_TYPE
from .policy import MAX_BODY, MAX_DELAY, MAX_HEADER_BYTES, MAX_HEADERS, MAX_ID, MAX_KEY, seconds

_NO_HEADERS: Mapping[str, str] = {}
Declare = Literal["auto", "check", "never"]
logger = logging.getLogger("brokerkit")

_SETTINGS = {"topic": ("partitions", "retention"), "queue": ("priorities", "dedup", "lease")}
_COMPARED = {
    "topic": ("type", "codec", "owned", *_SETTINGS["topic"]),
    "queue": ("type", "codec", "owned", "reply", "reply_codec", *_SETTINGS["queue"]),
}


class Bound:
    """An address as this broker uses it: its real name, its codec, what its backend can do."""

    __slots__ = (
        "address",
        "capabilities",
        "codec",
        "decode",
        "encode",
        "headers",
        "is_topic",
        "name",
        "reply_codec",
        "shown",
    )

    def __init__(self, shown: Address, address: Address, capabilities: Capabilities) -> None:
        self.shown = shown
        """The address as the user wrote it."""
        self.address = address
        self.name = address.name
        self.capabilities = capabilities
        plain = shown.of if isinstance(shown, DeadLetters) else shown
        self.is_topic = isinstance(plain, Topic)
        self.codec: BoundCodec = for_type(plain.type, plain.codec)
        self.encode, self.decode = self.codec.encode, self.codec.decode
        self.headers: Headers = ((CONTENT_TYPE, self.codec.content_type.encode()),)
        self.reply_codec: BoundCodec | None = None
        if isinstance(plain, Queue) and plain.reply is not None:
            self.reply_codec = for_type(plain.reply, plain.reply_codec)

    def read(self, record: Record) -> object:
        """Return the value of *record*, or raise `DecodeError`."""
        headers = record.headers
        if headers is self.headers or headers == self.headers:
            return self.decode(record.body, self.codec.content_type, _NO_HEADERS)
        content_type: str | None = None
        user: dict[str, str] = {}
        for name, value in headers:
            if name == CONTENT_TYPE:
                content_type = value.decode("utf-8", "replace")
            elif not name.startswith("bk-"):
                user[name] = value.decode("utf-8", "surrogateescape")
        return self.decode(record.body, content_type, user)

    def refuse(self, option: str) -> CapabilityError:
        """Return the error for an option that the backend cannot honour."""
        return CapabilityError(f"{self.capabilities.backend} cannot honour {option} on {self.shown!r}")


class Bindings:
    """The addresses that one broker has met."""

    def __init__(self, driver: Driver, prefix: str, declare: Declare) -> None:
        self.prefix = prefix
        self._driver = driver
        self._declare = declare
        self.first: dict[int, Bound] = {}
        """By `id()` of the first address object of each name, which its bound form keeps alive: the hot path."""
        self._by_name: dict[str, Bound] = {}
        self._lock = asyncio.Lock()

    def get(self, address: Address) -> Bound | None:
        """Return the bound form of *address* if this very object was bound before."""
        return self.first.get(id(address))

    async def bind(self, address: Address) -> Bound:
        """Check *address* against the backend and what this broker knows, and create it if that is asked for."""
        bound = self.first.get(id(address))
        if bound is not None:
            return bound
        self.real(address)
        async with self._lock:
            known = self._by_name.get(address.name)
            if known is not None:
                _compare(known.shown, address)
                return known
            bound = await self._bind(address)
            self._by_name[address.name] = bound
            if not isinstance(address, DeadLetters):
                self.first[id(address)] = bound
            return bound

    async def _bind(self, address: Address) -> Bound:
        real = with_prefix(address, self.prefix)
        if isinstance(address, DeadLetters):
            return Bound(address, real, await self._driver.capabilities(with_prefix(address.of, self.prefix)))
        bound = Bound(address, real, await self._driver.capabilities(real))
        if isinstance(address, Queue):
            _require(bound, address)
        await self._ensure(bound)
        return bound

    def real(self, address: Address) -> Address:
        """Return *address* as the backend knows it."""
        if not isinstance(address, (Topic, Queue, DeadLetters)):
            group = "; of which group? dead_letters('...')" if callable(address) else ""
            raise ConfigError(f"{address!r} is no address: use a Topic, a Queue or their dead letters{group}")
        return with_prefix(address, self.prefix)

    async def _ensure(self, bound: Bound) -> None:
        address = bound.address
        if self._declare == "check" and ".." not in address.name:  # derived names exist from their first record on
            self._match(bound, await self._driver.describe(address))
        elif self._declare == "auto" and not isinstance(address, DeadLetters) and address.owned:
            await self._driver.declare(address)
            try:
                found = await self._driver.describe(address)
            except AuthorizationError as error:
                logger.warning("%r: whether its settings are those of the program is not known: %s", bound.shown, error)
            else:
                self._warn(bound, found)

    @staticmethod
    def _warn(bound: Bound, found: Mapping[str, object] | None) -> None:
        """Warn of settings that exist otherwise: they count, and nothing is altered by itself."""
        for setting in _SETTINGS[bound.address.kind] if found is not None else ():
            wanted = getattr(bound.address, setting)
            if found is not None and setting in found and found[setting] != wanted:
                logger.warning(
                    "%r exists with %s=%r, which counts; the program says %r (declare='check' refuses that)",
                    bound.shown,
                    setting,
                    found[setting],
                    wanted,
                )

    def _match(self, bound: Bound, found: Mapping[str, object] | None) -> None:
        if found is None:
            raise NotFound(f"{bound.shown!r} does not exist and this broker creates nothing (declare='check')")
        if isinstance(bound.address, DeadLetters) or not bound.address.owned:
            return
        for setting in _SETTINGS[bound.address.kind]:
            wanted = getattr(bound.address, setting)
            if setting in found and found[setting] != wanted:
                raise SettingsMismatch(f"{bound.shown!r} has {setting}={found[setting]!r}, the program says {wanted!r}")

    async def declare(self, address: Address) -> None:
        """Create *address* whatever the mode says: the user asks for it."""
        if isinstance(address, DeadLetters):
            raise ConfigError(f"{address!r} comes with its address: declare that")
        if not address.owned:
            raise ConfigError(f"{address!r} is owned by others (owned=False): it is not created here")
        real = with_prefix(address, self.prefix)
        known = self._by_name.get(address.name)
        if known is not None:
            _compare(known.shown, address)
        elif isinstance(address, Queue):
            _require(Bound(address, real, await self._driver.capabilities(real)), address)
        await self._driver.declare(real)
        await self.bind(address)

    async def restore(self, address: Address) -> bool:
        """Create *address*, as the backend knows it, which was there and has vanished; return whether it is there now."""
        if self._declare != "auto" or isinstance(address, DeadLetters) or not address.owned:
            return False
        try:
            await self._driver.declare(address)
        except BrokerError:
            return False
        return True

    def forget(self, address: Address) -> None:
        """Drop what is known of *address*, which was deleted."""
        bound = self._by_name.pop(address.name, None)
        if bound is not None:
            self.first.pop(id(bound.shown), None)


def _compare(known: Address, address: Address) -> None:
    if known is address:
        return
    if known.kind != address.kind:
        raise ConfigError(f"{known!r} and {address!r}: a name is one thing; rename one of them")
    if isinstance(known, DeadLetters) and isinstance(address, DeadLetters):
        _compare(known.of, address.of)
        return
    for name in _COMPARED[address.kind]:
        one, other = getattr(known, name), getattr(address, name)
        if one is not other and one != other:
            raise ConfigError(
                f"{known!r} and {address!r} are one name with two settings: {name} is {one!r} and {other!r}"
            )


def _require(bound: Bound, queue: AnyQueue) -> None:
    can = bound.capabilities
    if queue.priorities > 1 and not can.priority:
        raise bound.refuse(f"priorities={queue.priorities}")
    if queue.dedup and not can.dedup:
        raise bound.refuse(f"dedup={queue.dedup:g}")


class Records:
    """Makes records out of values and options, checking each; one per broker."""

    def __init__(self, clock: Clock) -> None:
        self._time = clock.time
        self._prefix = os.urandom(10).hex() + "-"
        self._count = itertools.count(1)

    def new_id(self) -> str:
        """Return an id that no other message has."""
        return f"{self._prefix}{next(self._count)}"

    def simple(self, bound: Bound, value: object, key: str | bytes | None) -> Record:
        """Return the record of *value* with no option but the key: the hot path."""
        body = bound.encode(value)
        if body is not None and len(body) > MAX_BODY:
            raise _too_large(bound, body)
        if key is None:
            return Record(bound.address, f"{self._prefix}{next(self._count)}", body, None, bound.headers, self._time())
        if not bound.is_topic:
            raise _no_key(bound)
        name = f"{self._prefix}{next(self._count)}"
        return Record(bound.address, name, body, _check_key(key), bound.headers, self._time())

    def make(
        self,
        bound: Bound,
        value: object,
        key: str | bytes | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | datetime = 0,
        ttl: float | None = None,
        priority: int = 0,
    ) -> Record:
        """Return the record of *value*.

        Raises:
            ConfigError: an option that makes no sense, or not on this kind of address.
            CapabilityError: an option that this backend cannot honour.
            EncodeError: a value that is not of the address's type, or cannot be encoded.
            TooLarge: body, key, id or headers over their limit.
        """
        body = bound.codec.encode(value)
        if body is not None and len(body) > MAX_BODY:
            raise _too_large(bound, body)
        if bound.is_topic:
            if delay != 0 or ttl is not None or priority != 0:
                raise ConfigError(f"{bound.shown!r} is a topic: delay, ttl and priority are options of queues")
            wait = 0.0
        else:
            if key is not None:
                raise _no_key(bound)
            wait = self._queue_options(bound, delay, ttl, priority)
        return Record(
            bound.address,
            f"{self._prefix}{next(self._count)}" if id is None else _check_id(id),
            body,
            None if key is None else _check_key(key),
            bound.headers if not headers else (*bound.headers, *_check_headers(headers)),
            self._time(),
            wait,
            ttl,
            None,
            priority,
        )

    def outgoing(self, bound: Bound, item: Outgoing[Any]) -> Record:
        """Return the record of one item of `Broker.publish_many` or `Message.publish`."""
        return self.make(bound, item.value, item.key, item.id, item.headers, item.delay, item.ttl, item.priority)

    def _queue_options(self, bound: Bound, delay: float | datetime, ttl: float | None, priority: int) -> float:
        queue, can = bound.address, bound.capabilities
        assert isinstance(queue, Queue)
        wait = 0.0
        if isinstance(delay, datetime):
            if delay.tzinfo is None:
                raise ConfigError(f"delay needs a datetime with a time zone, not {delay!r}")
            # Rounding up, and never a delay in the past: "not before" holds by the publisher's clock.
            wait = seconds("delay", max(0.0, delay.timestamp() - self._time()))
        elif delay:
            wait = seconds("delay", delay)
        if wait and not can.delay:
            raise bound.refuse("delay")
        if ttl is not None:
            if seconds("ttl", ttl) <= 0:
                raise ConfigError(f"ttl must be more than 0 seconds, not {ttl!r}")
            if not can.ttl:
                raise bound.refuse("ttl")
        if priority.__class__ is not int or not 0 <= priority < queue.priorities:
            has = "no priorities=" if queue.priorities == 1 else f"the priorities 0 to {queue.priorities - 1}"
            raise ConfigError(f"priority {priority!r} on {bound.shown!r}: it was declared with {has}")
        return wait


def _too_large(bound: Bound, body: bytes) -> TooLarge:
    return TooLarge(
        f"a body of {len(body)} bytes for {bound.shown!r} is over the limit of {MAX_BODY}; publish a reference instead"
    )


def _no_key(bound: Bound) -> ConfigError:
    return ConfigError(f"{bound.shown!r} is a queue: key is an option of topics")


def _check_id(id: str) -> str:
    if not isinstance(id, str) or not id or not id.isprintable():
        raise ConfigError(f"id must be a non-empty text of printable characters, not {id!r}"[:300])
    if len(id) > MAX_ID:
        raise TooLarge(f"an id of {len(id)} characters is over the limit of {MAX_ID}")
    try:
        id.encode()
    except UnicodeEncodeError:
        raise ConfigError("id must be valid Unicode") from None
    return id


def _check_key(key: str | bytes) -> bytes:
    if isinstance(key, str):
        try:
            key = key.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ConfigError("key must be valid Unicode, or bytes") from None
    elif not isinstance(key, bytes):
        raise ConfigError(f"key must be str or bytes, not {type(key).__name__}")
    if len(key) > MAX_KEY:
        raise TooLarge(f"a key of {len(key)} bytes is over the limit of {MAX_KEY}")
    return key


def _check_headers(headers: Mapping[str, str]) -> Headers:
    if not isinstance(headers, Mapping):
        raise ConfigError(f"headers must be a mapping of str to str, not {type(headers).__name__}")
    if len(headers) > MAX_HEADERS:
        raise TooLarge(f"{len(headers)} headers are over the limit of {MAX_HEADERS}")
    checked: list[tuple[str, bytes]] = []
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigError(f"headers are str to str; {name!r} has a value of class {type(value).__name__}"[:300])
        if not name:
            raise ConfigError("a header name is empty")
        if name.lower().startswith("bk-"):
            raise ConfigError(f"header {name!r}: names beginning with 'bk-' are brokerkit's own")
        try:
            size += len(name.encode())
            encoded = value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"header {name!a} is not valid Unicode") from None
        size += len(encoded)
        checked.append((name, encoded))
    if size > MAX_HEADER_BYTES:
        raise TooLarge(f"headers of {size} bytes together are over the limit of {MAX_HEADER_BYTES}")
    return tuple(checked)


def check_timeout(timeout: float) -> float:
    """Return *timeout* if it is a positive number of seconds, else raise `ConfigError`."""
    checked = seconds("timeout", timeout, high=MAX_DELAY)
    if checked <= 0:
        raise ConfigError(f"timeout must be more than 0 seconds, not {timeout!r}")
    return checked
