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
Structs with tags) are written as they are.  On receipt a body is always validated: unknown fields are ignored, missing
ones take their default, nothing is converted.  On publish the class is checked, and what would arrive as another value
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final, TypeAlias, get_origin, is_typeddict

import msgspec
from msgspec import inspect as shape

from ._json import classes, is_model, read_model, reader, shape_of, shown, write, write_model
from ._lossless import Check, checker, only_float, write_plain
from ._unions import members_of, tags, told_apart, union_of
from .address import Codec
from .errors import ConfigError, DecodeError, EncodeError

JSON: Final = "application/json"
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"

_Encode: TypeAlias = Callable[[Any], bytes | None]
_Decode: TypeAlias = Callable[[bytes | None, str | None, Mapping[str, str]], Any]

_SUBCLASSED: Final = (str, int, float, bytes, list, dict, set, frozenset, tuple)
"""Of these a subclass's value (a StrEnum, a defaultdict) arrives as an equal one of the plain class."""


class BoundCodec(msgspec.Struct, frozen=True):
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
    members, nullable = members_of(form)
    if codec is not None:
        return _custom(form, members, nullable, codec)
    if len(members) == 1 and is_model(members[0]):
        shape_of(members[0])
        return _model(form, members[0], nullable)
    if len(members) == 1:
        match shape_of(members[0]):
            case shape.BytesType(min_length=None, max_length=None):
                return _raw(form, bytes, nullable)
            case shape.StrType(min_length=None, max_length=None, pattern=None):
                return _raw(form, str, nullable)
            case _:
                pass
    return _json(form, members, nullable)


# ---------------------------------------------------------------------------------------------------- errors


def _refuse(form: object, kinds: frozenset[type], value: object) -> EncodeError:
    kind = type(value)
    for base in kind.__mro__[1:]:
        if base in kinds and base not in _SUBCLASSED:
            return EncodeError(
                f"{kind.__name__} is a subclass of {base.__name__} and would arrive as {base.__name__}; "
                f"declare the address for {shown(form)} | {kind.__name__}"
            )
    return EncodeError(f"a value of class {kind.__name__} was given, the address carries {shown(form)}")


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


def _raw(form: object, kind: type[bytes] | type[str], nullable: bool) -> BoundCodec:
    kinds = frozenset({kind})
    check = _class_check(form, kinds, nullable)
    if kind is bytes:
        return _bind(form, BYTES, nullable, kinds, check, bytes, bytes)  # of bytes these are the same object
    return _bind(form, TEXT, nullable, kinds, check, str.encode, bytes.decode)


def _model(form: object, kind: Any, nullable: bool) -> BoundCodec:
    def load(body: bytes) -> Any:
        return read_model(kind, body)

    kinds = frozenset({kind})
    return _bind(form, JSON, nullable, kinds, _class_check(form, kinds, nullable), write_model, load)


def _json(form: object, members: list[Any], nullable: bool) -> BoundCodec:
    whole = union_of(members, nullable)
    if len(members) > 1 and (any(map(is_model, members)) or not told_apart(whole)):
        return _tagged(form, members, nullable)
    shape_of(whole)
    load = reader(whole).decode
    values = shape_of(union_of(members, False)) if members else shape.UnionType(())
    kinds = classes(values)
    if kinds is None:
        return _bind(form, JSON, True, frozenset(), _accept, write_plain, load)
    check = _class_check(form, kinds, nullable)
    if isinstance(values, shape.LiteralType):
        return _bind(form, JSON, nullable, frozenset(), _one_of(form, values.values, check), write, load)
    bound = _bind(form, JSON, nullable, kinds, check, write, load, checker(values))
    name = only_float(values)
    if name is not None:
        [kind] = kinds
        return msgspec.structs.replace(bound, encode=_encode_float(form, kind, name, bound.encode))
    return bound


def _encode_float(form: object, kind: type, name: str, otherwise: _Encode) -> _Encode:
    """Return `encode` for the commonest class of all, with one float to look at, without a call for the look."""
    get, finite = attrgetter(name), math.isfinite

    def encode(value: Any) -> bytes | None:
        if value.__class__ is kind:
            try:
                number = get(value)
                if number.__class__ is float and finite(number):
                    return write(value)
            except Exception as error:
                raise _unwritable(form, error) from error
        return otherwise(value)

    return encode


def _tagged(form: object, members: list[Any], nullable: bool) -> BoundCodec:
    table = tags(form, members)
    kinds = frozenset(table)
    read = reader(union_of([wrapper for wrapper, _ in table.values()], nullable)).decode

    def dump(value: Any) -> bytes:
        kind: type = value.__class__
        wrapper, look = table[kind if kind in table else _plain_base(kinds, value) or kind]
        if look is not None:
            look(value)
        return write(wrapper(value))

    def load(body: bytes) -> Any:
        found = read(body)
        return None if found is None else found.value

    return _bind(form, JSON, nullable, kinds, _class_check(form, kinds, nullable), dump, load)


def _bind(
    form: object,
    content_type: str,
    nullable: bool,
    kinds: frozenset[type],
    check: Callable[[Any], None],
    dump: Callable[[Any], bytes],
    load: Callable[[bytes], Any],
    look: Check | None = None,
) -> BoundCodec:
    """Return the codec of *dump* and *load*.  A value whose class is one of *kinds* needs no *check*."""

    def encode(value: Any) -> bytes | None:
        if value.__class__ not in kinds:
            check(value)
            if value is None and nullable:
                return None
        try:
            if look is not None:
                look(value)
            return dump(value)
        except Exception as error:
            raise _unwritable(form, error) from error

    def decode(body: bytes | None, got: str | None, _headers: Mapping[str, str]) -> Any:
        if got is not None and got != content_type:
            _demand_type(got, content_type)
        try:
            return load(body)  # type: ignore[arg-type]  # None raises; looking for it first would cost every message
        except Exception as error:
            if body is None and nullable:
                return None
            raise _unreadable(form, body, error) from error

    return BoundCodec(content_type, check, encode, decode)


def _one_of(form: object, values: tuple[object, ...], check: Callable[[Any], None]) -> Callable[[Any], None]:
    allowed = {(type(value), value) for value in values}

    def check_literal(value: Any) -> None:
        check(value)
        if value is not None and (type(value), value) not in allowed:
            raise EncodeError(f"the value is not one of {shown(form)}")

    return check_literal


def _custom(form: object, members: list[Any], nullable: bool, codec: Codec[Any]) -> BoundCodec:
    """Return what an address does with a codec of its own: the payload type only tells the class of values."""
    content_type = getattr(codec, "content_type", None)
    methods = getattr(codec, "encode", None), getattr(codec, "decode", None)
    if isinstance(codec, type) or not isinstance(content_type, str) or not all(map(callable, methods)):
        raise ConfigError(
            f"{codec!r} is no codec: give an object with content_type, encode(value) and decode(body, headers)"
        )
    content_type = content_type.lower()
    kinds: set[type] = set()
    for member in members:
        kind: object = get_origin(member) or member
        if is_typeddict(kind):
            kinds.add(dict)
        elif isinstance(kind, type) and kind is not Any:
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
