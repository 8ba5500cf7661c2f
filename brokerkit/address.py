"""Typed addresses: where messages go.  Plain values without a connection, shared by producers, consumers and tests.

An address is equal to another of the same kind and name.  Names the user chooses never contain ``..``; the names that
brokerkit derives from them do, and `internal` alone builds those.
"""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, Generic, Literal, Protocol, TypeAlias, final, overload

from typing_extensions import TypeForm, TypeVar

from .errors import ConfigError, InvalidName
from .policy import seconds, whole

T = TypeVar("T")
T1 = TypeVar("T1")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
A_co = TypeVar("A_co", default=None, covariant=True)
_Class: TypeAlias = builtins.type[T]

MAX_NAME: Final = 100
MAX_PREFIX: Final = 20
_NAME = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")


def check_name(name: str, what: str = "name") -> str:
    """Return *name* if it keeps the naming rules, else raise `InvalidName`; *what* says what kind of name it is.

    1 to 100 of ``A-Z a-z 0-9 . _ -``, no dot at either end, no ``..``, and not ``bk``.  Names are case-sensitive.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME or not _fits(name) or name == "bk":
        raise InvalidName(
            f"{what} {_shown(name)} is not allowed: use 1 to {MAX_NAME} of A-Z a-z 0-9 . _ -, "
            "no dot at either end, no '..'; 'bk' is reserved"
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return *prefix* (of ``?prefix=``) if names stay valid behind it, else raise `InvalidName`."""
    if not isinstance(prefix, str) or len(prefix) > MAX_PREFIX or (prefix and not _fits(prefix + "x")):
        raise InvalidName(
            f"prefix {_shown(prefix)} is not allowed: use up to {MAX_PREFIX} of A-Z a-z 0-9 . _ -, "
            "no dot at its beginning, no '..'"
        )
    return prefix


def _fits(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and ".." not in name


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


def internal(*parts: str) -> str:
    """Build a reserved name: *parts* joined by ``..``."""
    return "..".join(parts)


class Codec(Protocol[T]):
    """Turns values into bytes and back.  Both methods are plain functions and must not block."""

    @property
    def content_type(self) -> str:
        """Travels with each message; a message of another content type is not decoded by this codec."""
        ...

    def encode(self, value: T, /) -> bytes:
        """Return the body.  Whatever it raises becomes `EncodeError`."""
        ...

    def decode(self, body: bytes, headers: Mapping[str, str], /) -> T:
        """Return the value.  Whatever it raises becomes `DecodeError`."""
        ...


@final
class Outgoing(Generic[T_co]):
    """One item for `Broker.publish_many` with options of its own; made by ``address.outgoing(value, ...)``."""

    __slots__ = ("address", "delay", "headers", "id", "key", "priority", "ttl", "value")

    def __init__(
        self,
        address: AnyTopic | AnyQueue,
        value: T_co,
        key: str | bytes | None,
        id: str | None,
        headers: Mapping[str, str] | None,
        delay: float | datetime,
        ttl: float | None,
        priority: int,
    ) -> None:
        self.address: AnyTopic | AnyQueue = address
        self.value: T_co = value
        self.key: str | bytes | None = key
        self.id: str | None = id
        self.headers: Mapping[str, str] | None = headers
        self.delay: float | datetime = delay
        self.ttl: float | None = ttl
        self.priority: int = priority

    def __repr__(self) -> str:
        return f"<Outgoing {self.address!r} id={self.id!r}>"


class _Named:
    """What all addresses share: a name, equality by kind and name, and being frozen."""

    __slots__ = ("_hash", "name")
    kind: ClassVar[Literal["topic", "queue", "dead"]]
    name: str
    _hash: int

    def _freeze(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_hash", hash((self.kind, values["name"])))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Named) and self.kind == other.kind and self.name == other.name)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(f"{type(self).__name__} is not pickled; import it where it is declared")

    def __copy__(self) -> _Named:
        return self

    def __deepcopy__(self, memo: object) -> _Named:
        return self


def _check_type(owner: str, form: object) -> object:
    if form is None:
        return type(None)
    if isinstance(form, (str, bytes, int, float, list, tuple, dict, set)):
        raise ConfigError(f"{owner}: the payload type must be a type, not the value {form!r}")
    return form


@final
class Topic(_Named, Generic[T]):
    """A retained log: every group reads all of it, in order per key; acknowledging removes nothing.

    *type* is the payload: a dataclass, TypedDict, NamedTuple, ``msgspec.Struct``, pydantic model, plain JSON type, ``bytes``,
    ``str``, or a union.  *partitions* bounds how many members of a group take part at once.  *retention* is how many seconds
    messages are kept, None for ever.  ``owned=False`` marks a topic that others own: never created, altered or deleted, and
    any key, header or null body in it is consumable.

    Raises:
        InvalidName: the name breaks the naming rules.
        ConfigError: another option is out of range.
    """

    __slots__ = ("codec", "owned", "partitions", "retention", "type")
    kind: ClassVar[Literal["topic", "queue", "dead"]] = "topic"
    type: object
    partitions: int
    retention: float | None
    codec: Codec[T] | None
    owned: bool

    @overload
    def __init__(
        self,
        name: str,
        type: _Class[T],
        *,
        partitions: int = 8,
        retention: float | None = 7 * 86400,
        codec: Codec[T] | None = None,
        owned: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        type: TypeForm[T],
        *,
        partitions: int = 8,
        retention: float | None = 7 * 86400,
        codec: Codec[T] | None = None,
        owned: bool = True,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        type: object,
        *,
        partitions: int = 8,
        retention: float | None = 7 * 86400,
        codec: Codec[T] | None = None,
        owned: bool = True,
    ) -> None:
        self._freeze(
            name=check_name(name, "topic name"),
            type=_check_type(f"Topic({name!r})", type),
            partitions=whole(f"Topic({name!r}) partitions", partitions, low=1, high=10_000),
            retention=None
            if retention is None
            else seconds(f"Topic({name!r}) retention", retention, low=1, high=math.inf),
            codec=codec,
            owned=bool(owned),
        )

    def dead_letters(self, group: str) -> DeadLetters[T]:
        """Return the address of what *group* failed to handle."""
        return letters_of(self, check_name(group, "group name"))

    def outgoing(
        self,
        value: T,
        *,
        key: str | bytes | None = None,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Outgoing[T]:
        """Return an item for `Broker.publish_many` with options of its own."""
        return Outgoing(self, value, key, id, headers, 0, None, 0)

    def _named(self, name: str) -> Topic[T]:
        copy = object.__new__(builtins.type(self))
        copy._freeze(
            name=name,
            type=self.type,
            partitions=self.partitions,
            retention=self.retention,
            codec=self.codec,
            owned=self.owned,
        )
        return copy


@final
class Reply(Generic[R_co]):
    """Marks, in types only, a queue that answers: ``Queue("quotes", Order, reply=float)`` is a ``Queue[Order, Reply[float]]``."""


@final
class Queue(_Named, Generic[T, A_co]):
    """A work list: each message has one owner at a time, and acknowledging removes it.

    *priorities* is the number of levels, 0 to n - 1, higher first.  *dedup* drops a second message of the same id for that
    many seconds.  *lease* is how many seconds a message stays with a consumer that has died; while the consumer lives its
    leases are renewed.  With *reply* it answers requests of `Broker.request`.

    Raises:
        InvalidName: the name breaks the naming rules.
        ConfigError: another option is out of range.
    """

    __slots__ = ("codec", "dedup", "lease", "owned", "priorities", "reply", "reply_codec", "type")
    kind: ClassVar[Literal["topic", "queue", "dead"]] = "queue"
    type: object
    priorities: int
    dedup: float
    lease: float
    codec: Codec[T] | None
    owned: bool
    reply: object | None
    """The type of the answer, or None where nothing is answered (a type of answers that is None is ``type(None)``)."""
    reply_codec: Codec[object] | None

    @overload
    def __init__(
        self: Queue[T1, None],
        name: str,
        type: _Class[T1],
        *,
        priorities: int = 1,
        dedup: float = 0,
        lease: float = 60,
        codec: Codec[T1] | None = None,
        owned: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self: Queue[T1, Reply[R]],
        name: str,
        type: _Class[T1],
        *,
        reply: _Class[R],
        priorities: int = 1,
        lease: float = 60,
        codec: Codec[T1] | None = None,
        reply_codec: Codec[R] | None = None,
        owned: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self: Queue[T1, None],
        name: str,
        type: TypeForm[T1],
        *,
        priorities: int = 1,
        dedup: float = 0,
        lease: float = 60,
        codec: Codec[T1] | None = None,
        owned: bool = True,
    ) -> None: ...
    @overload
    def __init__(
        self: Queue[T1, Reply[R]],
        name: str,
        type: TypeForm[T1],
        *,
        reply: TypeForm[R],
        priorities: int = 1,
        lease: float = 60,
        codec: Codec[T1] | None = None,
        reply_codec: Codec[R] | None = None,
        owned: bool = True,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        type: object,
        *,
        reply: object = ...,
        priorities: int = 1,
        dedup: float = 0,
        lease: float = 60,
        codec: object = None,
        reply_codec: object = None,
        owned: bool = True,
    ) -> None:
        answers = reply is not ...
        if answers and dedup:
            raise ConfigError(f"Queue({name!r}): a queue that replies has no dedup")
        if not answers and reply_codec is not None:
            raise ConfigError(f"Queue({name!r}): reply_codec needs reply=")
        self._freeze(
            name=check_name(name, "queue name"),
            type=_check_type(f"Queue({name!r})", type),
            priorities=whole(f"Queue({name!r}) priorities", priorities, low=1, high=10),
            dedup=seconds(f"Queue({name!r}) dedup", dedup),
            lease=seconds(f"Queue({name!r}) lease", lease, low=1, high=86400),
            codec=codec,
            owned=bool(owned),
            reply=_check_type(f"Queue({name!r}) reply", reply) if answers else None,
            reply_codec=reply_codec,
        )

    @property
    def dead_letters(self) -> DeadLetters[T]:
        """The address of the messages that could not be handled."""
        return letters_of(self, None)

    def outgoing(
        self,
        value: T,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay: float | datetime = 0,
        ttl: float | None = None,
        priority: int = 0,
    ) -> Outgoing[T]:
        """Return an item for `Broker.publish_many` with options of its own."""
        return Outgoing(self, value, None, id, headers, delay, ttl, priority)

    def _named(self, name: str) -> Queue[T, A_co]:
        copy = object.__new__(builtins.type(self))
        copy._freeze(
            name=name,
            type=self.type,
            priorities=self.priorities,
            dedup=self.dedup,
            lease=self.lease,
            codec=self.codec,
            owned=self.owned,
            reply=self.reply,
            reply_codec=self.reply_codec,
        )
        return copy


@final
class DeadLetters(_Named, Generic[T]):
    """What could not be handled: of a queue, or of one group of a topic.  Browsed and redriven, never subscribed to."""

    __slots__ = ("group", "of")
    kind: ClassVar[Literal["topic", "queue", "dead"]] = "dead"
    of: AnyTopic | AnyQueue
    """The address whose messages end here."""
    group: str | None
    """The topic's group, or None for a queue."""

    def __init__(self) -> None:
        raise ConfigError("take dead letters from their address: queue.dead_letters or topic.dead_letters(group)")


def letters_of(of: Topic[T] | Queue[T, Any], group: str | None) -> DeadLetters[T]:
    """Return the dead letters of a queue, or of a topic's *group*."""
    form: type[DeadLetters[T]] = DeadLetters
    letters = object.__new__(form)
    parts = (of.name, "dead") if group is None else (of.name, group, "dead")
    letters._freeze(name=internal(*parts), of=of, group=group)
    return letters


AnyTopic: TypeAlias = Topic[Any]
AnyQueue: TypeAlias = Queue[Any, Any]
AnyDeadLetters: TypeAlias = DeadLetters[Any]
Address: TypeAlias = AnyTopic | AnyQueue | AnyDeadLetters
"""Any address, whatever its payload."""


def redrive_queue(topic: AnyTopic, group: str) -> AnyQueue:
    """Return the private queue that *group*'s subscriptions of *topic* read beside it: where redriven letters go."""
    queue: AnyQueue = Queue("again", bytes)  # the topic's own name may be as long as names are behind a prefix
    object.__setattr__(queue, "type", topic.type)
    object.__setattr__(queue, "codec", topic.codec)
    return queue._named(internal(topic.name, group, "again"))


def reply_topic() -> AnyTopic:
    """Return the one topic through which all replies travel; each broker reads those with its own inbox token as key."""
    return Topic("reply", bytes, partitions=1, retention=3600)._named(internal("bk", "reply"))


def with_prefix(address: Address, prefix: str) -> Address:
    """Return *address* as it is called behind ``?prefix=``; topics and queues of others keep their names."""
    if not prefix:
        return address
    if isinstance(address, DeadLetters):
        of = with_prefix(address.of, prefix)
        assert not isinstance(of, DeadLetters)
        return letters_of(of, None if address.group is None else prefix + address.group)
    return address._named(prefix + address.name) if address.owned else address
