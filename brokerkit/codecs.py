"""Payload types and their bytes: one bound codec for each address.

========================================  ===============================  =======================================
the address's type                        content type                     body
========================================  ===============================  =======================================
bytes                                     application/octet-stream         as it is
str                                       text/plain                       UTF-8
pydantic model                            application/json                 what pydantic writes, by alias
all else                                  application/json                 JSON by msgspec
several classes, ``Created | Shipped``    application/json                 ``{"type": "Created", "value": {...}}``
any of them ``| None``                    the same                         None has no body (a Kafka null)
a codec given to the address              the codec's                      the codec's
========================================  ===============================  =======================================

The form with ``type`` and ``value`` is used for each member of a union that JSON cannot tell apart (two dataclasses,
``str | datetime``), with the class's name as the tag.  Unions that it can tell apart (``Order | None``, ``int | str``,
Structs with tags) are written as they are.  On receipt a body is always validated: unknown fields are ignored, missing ones
take their default, nothing is converted.  On publish the class is checked, and what would arrive as another value is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin, is_typeddict

import msgspec
from msgspec import inspect as shape

from ._json import classes, is_model, read_model, reader, shape_of, shown, write, write_model
from ._lossless import Check, checker
from .address import Codec
from .errors import BrokerError, ConfigError, DecodeError, EncodeError

JSON: Final = "application/json"
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"

_Encode: TypeAlias = Callable[[Any], bytes | None]
_Decode: TypeAlias = Callable[[bytes | None, str | None, Mapping[str, str]], Any]

_SUBCLASSED: Final = (str, int, float, bytes, list, dict, set, frozenset, tuple)
"""Of these a subclass's value (a StrEnum, a defaultdict) arrives as an equal one of the plain class."""


@dataclass(frozen=True, slots=True)
class BoundCodec:
    """What an address does with values and bodies."""

    content_type: str
    check: Callable[[Any], None]
    """Raises `EncodeError` if a value is not of the address's type.  *encode* does the same first."""
    encode: _Encode
    """Returns the body.  Raises `EncodeError`."""
    decode: _Decode
    """Takes body, content type (None: a record without one) and headers, returns the value.  Raises `DecodeError`."""


def for_type(form: object, codec: Codec[Any] | None = None) -> BoundCodec:
    """Return the codec of an address with the payload type *form*, through *codec* if the address has its own.

    Raises:
        ConfigError: the type is not supported.
    """
    members, nullable = _members(form)
    if codec is not None:
        return _custom(form, members, nullable, codec)
    if len(members) == 1 and is_model(members[0]):
        shape_of(members[0])
        return _model(members[0], nullable)
    if len(members) == 1:
        match shape_of(members[0]):
            case shape.BytesType(min_length=None, max_length=None):
                return _raw(bytes, nullable)
            case shape.StrType(min_length=None, max_length=None, pattern=None):
                return _raw(str, nullable)
            case _:
                pass
    return _json(form, members, nullable)


def _members(form: object) -> tuple[list[Any], bool]:
    """Return the members of a union, nested ones and aliases opened, without None, and whether None was one."""
    if form is None or form is type(None):
        return [], True
    if type(form).__name__ == "TypeAliasType":  # of typing or of typing_extensions
        alias: Any = form
        return _members(alias.__value__)
    origin = get_origin(form)
    if origin is Union or origin is types.UnionType:
        parts = [_members(part) for part in get_args(form)]
        members = [member for found, _ in parts for member in found]
        return [member for i, member in enumerate(members) if member not in members[:i]], any(null for _, null in parts)
    if origin is Annotated:
        members, nullable = _members(get_args(form)[0])
        if nullable or len(members) != 1:
            return members, nullable
    if origin is Literal and None in get_args(form):
        rest = tuple(value for value in get_args(form) if value is not None)
        return ([Literal[rest]] if rest else []), True
    return [form], False


# ---------------------------------------------------------------------------------------------------- errors


def _refuse(form: object, kinds: frozenset[type], value: object) -> EncodeError:
    kind = type(value)
    for base in kind.__mro__[1:]:
        if base in kinds and base not in _SUBCLASSED:
            return EncodeError(
                f"{kind.__name__} is a subclass of {base.__name__} and would arrive as {base.__name__}; "
                f"declare the address for {shown(form)} | {kind.__name__}"
            )
    return EncodeError(f"a {kind.__name__} was given where the address carries {shown(form)}")


def _unwritable(form: object, error: BaseException) -> EncodeError:
    reason = "it is nested too deeply, or in itself" if isinstance(error, RecursionError) else str(error)
    return EncodeError(f"this {shown(form)} cannot be written: {reason}")


def _unreadable(form: object, body: bytes | None, error: BaseException) -> DecodeError:
    if body is None:
        return DecodeError(f"the record has no body, and {shown(form)} admits no None")
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
    return DecodeError(f"the body is no {shown(form)}: {reason}")


def _demand_type(content_type: str, own: str) -> None:
    """Raise unless the *content_type* of a message is the codec's *own*; parameters such as a charset do not count."""
    if content_type.partition(";")[0].strip().lower() != own:
        raise DecodeError(f"the message has content type {content_type[:100]!r}, the address's codec reads {own!r}")


# ---------------------------------------------------------------------------------------------------- classes of values


def _class_check(form: object, kinds: frozenset[type] | None, nullable: bool) -> Callable[[Any], None]:
    """Return the function that raises unless a value has one of *kinds* (None: any)."""
    if kinds is None:
        return _accept
    kinds_ = kinds | {type(None)} if nullable else kinds

    def check_kinds(value: Any) -> None:
        if value.__class__ not in kinds_ and _plain_base(kinds_, value) is None:
            raise _refuse(form, kinds_, value)

    if len(kinds_) > 1:
        return check_kinds
    [only] = kinds_

    def check_one(value: Any) -> None:
        if value.__class__ is not only:
            check_kinds(value)

    return check_one


def _accept(_value: Any) -> None:
    """Any value will do."""


def _plain_base(kinds: frozenset[type], value: object) -> type | None:
    """Return the class of *kinds* as an equal value of which *value* arrives."""
    if isinstance(value, bool):
        return None
    for base in type(value).__mro__:
        if base in kinds and base in _SUBCLASSED:
            return base
    return float if float in kinds and isinstance(value, int) else None


# ---------------------------------------------------------------------------------------------------- the codecs


def _raw(kind: type[bytes] | type[str], nullable: bool) -> BoundCodec:
    content_type = BYTES if kind is bytes else TEXT
    check = _class_check(kind, frozenset({kind}), nullable)

    def encode(value: Any) -> bytes | None:
        if value.__class__ is not kind:
            check(value)
        if value is None or kind is bytes:
            return value  # type: ignore[no-any-return]
        try:
            return value.encode()  # type: ignore[no-any-return]
        except UnicodeError as error:
            raise _unwritable(kind, error) from error

    def decode(body: bytes | None, got: str | None, _headers: Mapping[str, str]) -> Any:
        if got is not None and got != content_type:
            _demand_type(got, content_type)
        if body is None:
            if nullable:
                return None
            raise _unreadable(kind, body, ValueError())
        if kind is bytes:
            return body
        try:
            return body.decode()
        except UnicodeError as error:
            raise _unreadable(kind, body, error) from error

    return BoundCodec(content_type, check, encode, decode)


def _bind(
    form: object,
    nullable: bool,
    content_type: str,
    check: Callable[[Any], None],
    only: type | None,
    dump: Callable[[Any], bytes],
    load: Callable[[bytes], Any],
    look: Check | None = None,
) -> BoundCodec:
    """Return the codec of *dump* and *load*.  A value of the class *only* needs no further *check*."""

    def encode_looking(value: Any) -> bytes | None:
        if value.__class__ is not only:
            check(value)
            if value is None and nullable:
                return None
        try:
            if look is not None:
                look(value)
            return dump(value)
        except BrokerError:
            raise
        except Exception as error:
            raise _unwritable(form, error) from error

    def encode_plain(value: Any) -> bytes | None:
        if value.__class__ is not only:
            check(value)
            if value is None and nullable:
                return None
        try:
            return dump(value)
        except BrokerError:
            raise
        except Exception as error:
            raise _unwritable(form, error) from error

    def decode(body: bytes | None, got: str | None, _headers: Mapping[str, str]) -> Any:
        if got is not None and got != content_type:
            _demand_type(got, content_type)
        try:
            return load(body)  # type: ignore[arg-type]  # a body that is None raises, and costs the others nothing
        except Exception as error:
            if body is None and nullable:
                return None
            raise _unreadable(form, body, error) from error

    return BoundCodec(content_type, check, encode_plain if look is None else encode_looking, decode)


def _only(kinds: frozenset[type] | None) -> type | None:
    return next(iter(kinds)) if kinds is not None and len(kinds) == 1 else None


def _model(kind: Any, nullable: bool) -> BoundCodec:
    check = _class_check(kind, frozenset({kind}), nullable)

    def load(body: bytes) -> Any:
        return read_model(kind, body)

    return _bind(kind, nullable, JSON, check, kind, write_model, load)


def _json(form: object, members: list[Any], nullable: bool) -> BoundCodec:
    whole = _union(members, nullable)
    if len(members) > 1 and (any(map(is_model, members)) or not _told_apart(whole)):
        return _tagged(form, members, nullable)
    node = shape_of(whole)
    values = shape_of(_union(members, False)) if members else node
    kinds = classes(values)
    check = _class_check(form, kinds, nullable)
    if isinstance(values, shape.LiteralType):
        check = _one_of(form, values.values, check)
    only = None if isinstance(values, shape.LiteralType) else _only(kinds)
    return _bind(form, nullable, JSON, check, only, write, reader(whole).decode, checker(values))


def _one_of(form: object, values: tuple[object, ...], check: Callable[[Any], None]) -> Callable[[Any], None]:
    allowed = {(type(value), value) for value in values}

    def check_literal(value: Any) -> None:
        check(value)
        if value is not None and (type(value), value) not in allowed:
            raise EncodeError(f"the value is not one of {shown(form)}")

    return check_literal


def _union(members: list[Any], nullable: bool) -> Any:
    return Union[(*members, None)] if nullable else Union[tuple(members)]  # noqa: UP007  # the members are computed


def _told_apart(union: Any) -> bool:
    try:
        reader(union)
    except TypeError:
        return False
    return True


def _tagged(form: object, members: list[Any], nullable: bool) -> BoundCodec:
    """Return the codec of a union whose members JSON cannot tell apart: each travels with its name."""
    wrappers: dict[type, Callable[[Any], Any]] = {}
    checks: dict[type, Check] = {}
    for name, member in _named(form, members).items():
        node = shape_of(member)
        kinds = classes(node)
        if kinds is None:
            raise ConfigError(f"the payload type {shown(form)} is not supported: Any takes every other member")
        if name == "Literal":
            kinds -= wrappers.keys()  # Literal["a"] | str is str
        elif kinds & wrappers.keys():
            raise ConfigError(
                f"the payload type {shown(form)} is not supported: the class of a value does not tell {shown(member)} "
                "from another member; use a class for each"
            )
        struct = msgspec.defstruct(name, [("value", member)], tag=name, tag_field="type", frozen=True)
        wrappers |= dict.fromkeys(kinds, struct)
        look = checker(node)
        if look is not None:
            checks |= dict.fromkeys(kinds, look)
    known = frozenset(wrappers)
    check = _class_check(form, known, nullable)
    read = reader(_union(list(wrappers.values()), nullable)).decode

    def dump(value: Any) -> bytes:
        kind: type = value.__class__
        if kind not in wrappers:
            kind = _plain_base(known, value) or kind
        if kind in checks:
            checks[kind](value)
        return write(wrappers[kind](value))

    def load(body: bytes) -> Any:
        found = read(body)
        return None if found is None else found.value

    return _bind(form, nullable, JSON, check, None, dump, load)


def _named(form: object, members: list[Any]) -> dict[str, Any]:
    """Return the members of a union by the names they travel with; all Literals are one member, the last."""
    named: dict[str, Any] = {}
    literals: list[object] = []
    for member in members:
        origin = get_origin(member) or member
        if origin is Literal:
            literals += get_args(member)
        elif named.setdefault(getattr(origin, "__name__", shown(member)), member) is not member:
            raise ConfigError(
                f"the payload type {shown(form)} is not supported: two of its members are called {origin.__name__}"
            )
    return named | ({"Literal": Literal[tuple(literals)]} if literals else {})


def _custom(form: object, members: list[Any], nullable: bool, codec: Codec[Any]) -> BoundCodec:
    """Return what an address does with a codec of its own: the payload type only tells the class of values."""
    content_type = getattr(codec, "content_type", None)
    if (
        not isinstance(content_type, str)
        or not callable(getattr(codec, "encode", None))
        or not callable(getattr(codec, "decode", None))
    ):
        raise ConfigError(f"{codec!r} is no codec: it needs content_type, encode(value) and decode(body, headers)")
    content_type = content_type.lower()
    kinds: set[type] = set()
    for member in members:
        kind: object = get_origin(member) or member
        if is_typeddict(kind):
            kinds.add(dict)
        elif isinstance(kind, type):
            kinds.add(kind)
        else:
            kinds.add(object)
    if nullable:
        kinds.add(type(None))
    accepted = tuple(kinds)

    def check(value: Any) -> None:
        if not isinstance(value, accepted):
            raise _refuse(form, frozenset(accepted), value)

    def encode(value: Any) -> bytes | None:
        check(value)
        if value is None and nullable:
            return None
        try:
            body = codec.encode(value)
        except Exception as error:
            raise _unwritable(form, error) from error
        if not isinstance(body, bytes):
            raise EncodeError(f"{type(codec).__name__}.encode returned {type(body).__name__} instead of bytes")
        return body

    def decode(body: bytes | None, got: str | None, headers: Mapping[str, str]) -> Any:
        if got is not None and got != content_type:
            _demand_type(got, content_type)
        if body is None:
            if nullable:
                return None
            raise _unreadable(form, body, ValueError())
        try:
            return codec.decode(body, headers)
        except Exception as error:
            raise _unreadable(form, body, error) from error

    return BoundCodec(content_type, check, encode, decode)
