"""Refuses values that JSON would change without a word.

msgspec writes a float that is not finite as null, cuts a zone offset with seconds to minutes, turns dict keys into
text, and what stands where the type says ``Any`` comes back as JSON has it (a tuple as a list).  `checker` finds once
per type where such values can stand, so that only there is anything looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import UTC
from decimal import Decimal
from operator import attrgetter
from typing import Any, Final, TypeAlias

import msgspec
import orjson
from msgspec import inspect as shape

from ._json import bare, classes, read_any, write

Check: TypeAlias = Callable[[Any], None]
"""Raises ValueError if a value would arrive as another one."""


def checker(node: shape.Type) -> Check | None:
    """Return the function that looks at what would change, or None if nothing of that kind can stand in *node*."""
    return _Checks().of(node)


def only_float(node: shape.Type) -> str | None:
    """Return the name of the field that is all that `checker` looks at in the class *node*, if it is a float."""
    if not isinstance(node, (shape.DataclassType, shape.StructType)):
        return None
    looked_at = [field for field in node.fields if _may_change(field.type, set())]
    if len(looked_at) == 1 and isinstance(bare(looked_at[0].type), shape.FloatType):
        return looked_at[0].name
    return None


def _float(value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a float in it is not finite, and JSON has no such number")
    elif isinstance(value, bool) or not isinstance(value, int):
        if value is not msgspec.UNSET:
            raise ValueError(f"a float in it is a {type(value).__name__}")
    elif float(value) != value:
        raise ValueError("a float in it is an int that no float equals")


def _floats(values: Iterable[Any]) -> None:
    if set(map(type, values)) != _ONLY_FLOAT or not all(map(math.isfinite, values)):
        for value in values:
            _float(value)


_ONLY_FLOAT: Final = {float}


def _decimal(value: Any) -> None:
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError("a Decimal in it is not finite")


def _offset(value: Any) -> None:
    zone = getattr(value, "tzinfo", None)
    if zone is None or zone is UTC:
        return
    offset = value.utcoffset()
    if offset is not None and (offset.seconds % 60 or offset.microseconds):
        raise ValueError("a zone offset in it has seconds, which JSON's ISO 8601 cannot carry; convert the time to UTC")


def _plain(value: Any) -> None:
    write_plain(value)


_CHANGED: Final = (
    "where its type says Any stands something that JSON would change (such as a tuple, a set, a datetime, NaN, or a "
    "dict key that is no text); give it a type"
)


def write_plain(value: Any) -> bytes:
    """Write a value that is plain JSON as a whole."""
    try:
        body = orjson.dumps(value)
    except TypeError:  # an int beyond 64 bits, which msgspec writes exactly, or what is about to be refused
        body = write(value)
    if read_any(body) != value:
        raise ValueError(_CHANGED)
    return body


def _text_keys(value: Any) -> None:
    "".join(value)  # the cheapest way to see that all are text: else TypeError


class _Checks:
    """One walk over a type.  A class may hold itself: its check is found through the table when it runs."""

    def __init__(self) -> None:
        self.classes: dict[object, Check] = {}

    def of(self, node: shape.Type) -> Check | None:
        match bare(node):
            case shape.FloatType():
                return _float
            case shape.DecimalType():
                return _decimal
            case shape.DateTimeType() | shape.TimeType():
                return _offset
            case shape.AnyType() | shape.ListType(item_type=shape.AnyType()):
                return _plain
            case shape.ListType() | shape.SetType() | shape.FrozenSetType() | shape.VarTupleType() as many:
                return _each(self.of(many.item_type))
            case shape.TupleType(item_types=nodes):
                return _places([self.of(inner) for inner in nodes])
            case shape.DictType(key_type=key, value_type=item):
                return self._dict(bare(key), item)
            case shape.UnionType(types=nodes):
                return self._union(nodes)
            case shape.DataclassType() | shape.StructType() | shape.NamedTupleType() | shape.TypedDictType() as kind:
                return self._class(kind)
            case _:
                return None

    def _dict(self, key: shape.Type, item: shape.Type) -> Check:
        if isinstance(key, shape.AnyType) or (isinstance(key, shape.StrType) and isinstance(bare(item), shape.AnyType)):
            return _plain
        keys = _text_keys if isinstance(key, shape.StrType) else _each(self.of(key))
        values = _each(self.of(item))

        def check(value: Any) -> None:
            if keys is not None:
                keys(value)
            if values is not None:
                values(value.values())

        return check

    def _union(self, nodes: Iterable[shape.Type]) -> Check | None:
        table: dict[type, Check] = {}
        for node in nodes:
            kinds, check = classes(node), self.of(node)
            if kinds is None:
                return _plain
            if check is not None:
                table |= dict.fromkeys(kinds, check)
        if float in table and not any(isinstance(bare(node), shape.IntType) for node in nodes):
            table[int] = _float
        find = table.get

        def check_member(value: Any) -> None:
            check = find(value.__class__)
            if check is not None:
                check(value)

        return check_member if table else None

    def _class(
        self, node: shape.DataclassType | shape.StructType | shape.NamedTupleType | shape.TypedDictType
    ) -> Check | None:
        if node.cls in self.classes:
            return self.classes[node.cls]
        if not _may_change(node, set()):
            return None
        checks = self.classes

        def again(value: Any) -> None:
            checks[node.cls](value)

        checks[node.cls] = again
        fields = [(field.name, check) for field in node.fields if (check := self.of(field.type)) is not None]
        checks[node.cls] = _items(fields) if isinstance(node, shape.TypedDictType) else _attributes(fields)
        return checks[node.cls]


def _may_change(node: shape.Type, seen: set[object]) -> bool:
    """Return whether anything that needs a look can stand in *node*."""
    match bare(node):
        case shape.DataclassType() | shape.StructType() | shape.NamedTupleType() | shape.TypedDictType() as kind:
            if kind.cls in seen:
                return False
            seen.add(kind.cls)
            return any(_may_change(field.type, seen) for field in kind.fields)
        case shape.ListType() | shape.SetType() | shape.FrozenSetType() | shape.VarTupleType() as many:
            return _may_change(many.item_type, seen)
        case shape.UnionType(types=nodes) | shape.TupleType(item_types=nodes):
            return any(_may_change(inner, seen) for inner in nodes)
        case found:
            return isinstance(
                found,
                (shape.AnyType, shape.FloatType, shape.DecimalType, shape.DateTimeType, shape.TimeType, shape.DictType),
            )


def _each(check: Check | None) -> Check | None:
    if check is None or check is _float:
        return check and _floats

    def check_each(values: Any) -> None:
        for value in values:
            check(value)

    return check_each


def _places(checks: list[Check | None]) -> Check | None:
    places = [(index, check) for index, check in enumerate(checks) if check is not None]

    def check_places(value: Any) -> None:
        for index, check in places:
            check(value[index])

    return check_places if places else None


def _items(fields: list[tuple[str, Check]]) -> Check:
    def check_items(value: Any) -> None:
        for name, check in fields:
            if name in value:
                check(value[name])

    return check_items


def _attributes(fields: list[tuple[str, Check]]) -> Check:
    floats = [name for name, check in fields if check is _float]
    others = [(attrgetter(name), check) for name, check in fields if check is not _float]
    finite = math.isfinite
    get_floats = _getter(floats)

    def check_fields(value: Any) -> None:
        for number in get_floats(value):
            if number.__class__ is not float or not finite(number):
                _float(number)
        for get, check in others:
            check(get(value))

    return check_fields


def _getter(names: list[str]) -> Callable[[Any], Iterable[Any]]:
    if not names:
        return lambda _value: ()
    # attrgetter of one name gives no tuple; the name twice costs less than a function of Python.
    return attrgetter(*names, names[0])
