"""JSON of one payload type: what is supported, how it is written and read, and which classes its values have."""

from __future__ import annotations

import math
import sys
import types
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, Union, get_args, get_origin
from uuid import UUID

import msgspec
from msgspec import inspect as shape

from .errors import ConfigError

SUPPORTED: Final = (
    "supported are dataclasses, TypedDicts, NamedTuples, msgspec.Structs, pydantic models, Enums of str or int, "
    "Literals, bool, int, float, str, bytes, None, list, dict, tuple, set, frozenset, Decimal, UUID, datetime, date, "
    "time, timedelta, Any for plain JSON, and unions of these"
)

_LEAVES: Final[dict[type[shape.Type], type]] = {
    shape.NoneType: type(None),
    shape.BoolType: bool,
    shape.IntType: int,
    shape.FloatType: float,
    shape.StrType: str,
    shape.BytesType: bytes,
    shape.ByteArrayType: bytearray,
    shape.DateTimeType: datetime,
    shape.DateType: date,
    shape.TimeType: time,
    shape.TimeDeltaType: timedelta,
    shape.DecimalType: Decimal,
    shape.UUIDType: UUID,
    shape.ListType: list,
    shape.SetType: set,
    shape.FrozenSetType: frozenset,
    shape.VarTupleType: tuple,
    shape.TupleType: tuple,
    shape.DictType: dict,
    shape.TypedDictType: dict,
}
_KEYS: Final = (
    shape.AnyType, shape.StrType, shape.IntType, shape.FloatType, shape.BytesType, shape.DateTimeType, shape.DateType,
    shape.TimeType, shape.TimeDeltaType, shape.DecimalType, shape.UUIDType, shape.EnumType, shape.LiteralType,
)  # fmt: skip


def shown(form: object) -> str:
    """Return *form* as its author wrote it, nearly."""
    origin, arguments = get_origin(form), get_args(form)
    if form.__class__ is list:  # the parameters of a Callable
        parameters: Any = form
        return f"[{', '.join(map(shown, parameters))}]"
    if form is None or form is type(None):
        return "None"
    if origin is Union or origin is types.UnionType:
        return " | ".join(map(shown, arguments))
    if origin is Annotated:
        return shown(arguments[0])
    if isinstance(origin, type):
        return f"{origin.__name__}[{', '.join(map(shown, arguments))}]"
    return form.__name__ if isinstance(form, type) else repr(form).replace("typing.", "")


def is_model(form: object) -> bool:
    """Return whether *form* is a pydantic model; pydantic is not imported for that."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(form, type) and issubclass(form, pydantic.BaseModel)


def write_model(model: Any) -> bytes:
    """Write a pydantic model so that the same class reads it back."""
    body: bytes = model.__pydantic_serializer__.to_json(model, by_alias=True, round_trip=True, warnings="error")
    if body.find(b"null") >= 0:
        _finite(model.__pydantic_serializer__.to_python(model))
    return body


def read_model(kind: Any, body: bytes) -> Any:
    """Validate *body* as the pydantic model *kind*.  The error text holds no values."""
    try:
        return kind.__pydantic_validator__.validate_json(body)
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        details: Any = error
        lines = [
            f"{item['msg']} - at `$.{'.'.join(map(str, item['loc']))}`"
            for item in details.errors(include_url=False, include_context=False, include_input=False)
        ]
    raise ValueError("; ".join(lines))  # outside the except clause: the original shows the input


def _finite(value: Any) -> None:
    """Walk what a model consists of: pydantic writes NaN as null."""
    kind: type[Any] = value.__class__
    if issubclass(kind, float) and not math.isfinite(value):
        raise ValueError("a float in it is not finite, and JSON has no such number")
    if issubclass(kind, dict):
        _finite(list(value.values()))
    elif issubclass(kind, (list, tuple, set, frozenset)):
        for item in value:
            _finite(item)


def _enc_hook(value: object) -> object:
    if is_model(type(value)):
        return msgspec.Raw(write_model(value))
    raise TypeError(f"{type(value).__name__} is not supported")


def _dec_hook(kind: type, value: object) -> object:
    return read_model(kind, msgspec.json.encode(value))


write: Final = msgspec.json.Encoder(enc_hook=_enc_hook).encode
read_any: Final = msgspec.json.Decoder().decode


def reader(form: Any) -> msgspec.json.Decoder[Any]:
    """Return the validating decoder of *form*."""
    return msgspec.json.Decoder(form, dec_hook=_dec_hook)


def shape_of(form: object) -> shape.Type:
    """Return what *form* consists of.

    Raises:
        ConfigError: it holds something that JSON cannot carry.
    """
    try:
        node = shape.type_info(form)
        reader(form)
    except Exception as error:
        text = str(error)
        if "unions may not contain more than one" in text:
            text = (
                "below the top of a payload a union may hold one class only, because JSON does not tell them apart; "
                f"make them msgspec.Structs with tag=True ({text})"
            )
        raise ConfigError(f"the payload type {shown(form)} is not supported: {text}; {SUPPORTED}") from error
    _demand(node, shown(form), set())
    return node


def _demand(node: shape.Type, path: str, seen: set[object]) -> None:
    """Raise `ConfigError` if *node* is no type of ours; *path* says where it stands."""
    match node:
        case shape.Metadata(type=inner):
            _demand(inner, path, seen)
        case shape.CustomType(cls=kind):
            if not is_model(kind):
                what = "" if path == shown(kind) else f" (at {path})"
                raise ConfigError(f"the payload type {shown(kind)}{what} is not supported; {SUPPORTED}")
            if not hasattr(kind, "__pydantic_serializer__"):
                raise ConfigError(f"the payload type {path} is a model of pydantic 1; pydantic 2 is supported")
        case shape.UnionType(types=nodes) | shape.TupleType(item_types=nodes):
            for inner in nodes:
                _demand(inner, path, seen)
        case shape.DictType(key_type=key, value_type=value):
            if not isinstance(bare(key), _KEYS):
                raise ConfigError(
                    f"the dict at {path} has keys that JSON cannot carry: use str, int, float, bytes, Decimal, UUID, "
                    "datetime, date, time, timedelta, an Enum or a Literal"
                )
            _demand(value, f"{path}[...]", seen)
        case shape.ListType() | shape.SetType() | shape.FrozenSetType() | shape.VarTupleType():
            _demand(node.item_type, f"{path}[...]", seen)
        case shape.DataclassType() | shape.StructType() | shape.NamedTupleType() | shape.TypedDictType():
            if node.cls not in seen:
                seen.add(node.cls)
                for field in node.fields:
                    _demand(field.type, f"{path}.{field.name}", seen)
        case shape.AnyType() | shape.EnumType() | shape.LiteralType():
            pass
        case _:
            if type(node) not in _LEAVES:
                raise ConfigError(f"the payload type {path} is not supported; {SUPPORTED}")


def bare(node: shape.Type) -> shape.Type:
    """Return *node* without the metadata that is for documents only."""
    return bare(node.type) if isinstance(node, shape.Metadata) else node


def classes(node: shape.Type) -> frozenset[type] | None:
    """Return the exact classes of values of *node*, or None if it is ``Any``."""
    match bare(node):
        case shape.AnyType():
            return None
        case shape.UnionType(types=nodes):
            union: frozenset[type] = frozenset()
            for inner in nodes:
                kinds = classes(inner)
                if kinds is None:
                    return None
                union |= kinds
            return union
        case shape.LiteralType(values=values):
            return frozenset(map(type, values))
        case (
            shape.DataclassType()
            | shape.StructType()
            | shape.NamedTupleType()
            | shape.EnumType()
            | shape.CustomType() as known
        ):
            return frozenset({get_origin(known.cls) or known.cls})
        case leaf:
            return frozenset({_LEAVES[type(leaf)]})
