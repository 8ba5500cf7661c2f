"""JSON for one payload type: what is supported, what must be checked before writing, and how a union is told apart.

msgspec writes and reads.  It writes three things in a way that reads back as something else, without a word: a float that is
not finite (as null), a zone offset with seconds (cut to minutes), and whatever stands where the type says ``Any`` (a tuple
comes back as a list).  `compile_check` finds out once per type where such values can stand, and looks only there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect as shape

from .errors import ConfigError

Check: TypeAlias = Callable[[Any], None]
"""Raises ValueError if the value would not arrive as it is."""

SUPPORTED = (
    "dataclasses, TypedDicts, NamedTuples, msgspec.Structs, pydantic models, Enums of str or int, Literals, bool, int, float, str, "
    "bytes, None, list, dict, tuple, set, frozenset, Decimal, UUID, datetime, date, time, timedelta, Any (plain JSON), "
    "and unions of them"
)

_CLASS_NODES = (shape.DataclassType, shape.StructType, shape.NamedTupleType)
_ITEM_NODES = (shape.ListType, shape.SetType, shape.FrozenSetType, shape.VarTupleType)
_LEAVES: dict[type[shape.Type], type] = {
    shape.NoneType: type(None),
    shape.BoolType: bool,
    shape.IntType: int,
    shape.FloatType: float,
    shape.StrType: str,
    shape.BytesType: bytes,
    shape.ByteArrayType: bytearray,
    shape.DateTimeType: __import__("datetime").datetime,
}
