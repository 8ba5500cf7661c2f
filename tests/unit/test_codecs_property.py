"""What arrives is equal to what was published, for every supported type; what would not be is refused.

Types are drawn as well as values: leaves, containers, classes of five kinds, nested, and unions of them at the top.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Union
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brokerkit.codecs import BoundCodec, for_type
from brokerkit.errors import DecodeError, EncodeError

X = TypeVar("X")


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Size(IntEnum):
    S = 1
    L = 2


class Mood(StrEnum):
    GOOD = "good"


@dataclasses.dataclass
class Envelope(Generic[X]):
    data: X


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    value: float
    children: list[Tree] = dataclasses.field(default_factory=list)


class Summer(tzinfo):
    """A zone with a rule: one hour more in half of the year."""

    def __init__(self, winter: timedelta) -> None:
        self.winter = winter

    def utcoffset(self, moment: datetime | None) -> timedelta:
        summer = moment is not None and 4 <= moment.month <= 9
        return self.winter + timedelta(hours=summer)

    def dst(self, moment: datetime | None) -> timedelta | None:
        return None


Typed = tuple[Any, Any, st.SearchStrategy[Any]]
"""A type, the class that tells its values apart in a union, and its values."""

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
zones: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.just(UTC),
    st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    st.builds(Summer, st.sampled_from([timedelta(hours=1), timedelta(hours=-3, minutes=-30)])),
)
plain_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), finite, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
times = st.datetimes(timezones=zones)

HASHED: list[Typed] = [
    (bool, bool, st.booleans()),
    (int, int, st.integers()),
    (float, float, finite),
    (str, str, text),
    (bytes, bytes, st.binary(max_size=8)),
    (Decimal, Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (UUID, UUID, st.uuids()),
    (datetime, datetime, times),
    (date, date, st.dates()),
    (time, time, st.times()),
    (timedelta, timedelta, st.timedeltas()),
    (Colour, Colour, st.sampled_from(Colour)),
    (Size, Size, st.sampled_from(Size)),
    (Mood, Mood, st.sampled_from(Mood)),
    (Literal["a", "b"], str, st.sampled_from(["a", "b"])),
    (Literal[1, 2], int, st.sampled_from([1, 2])),
]
LEAVES: list[Typed] = [
    *HASHED,
    (type(None), type(None), st.none()),
    (Any, object, plain_json),
    (dict[str, Any], dict, st.dictionaries(text, plain_json, max_size=3)),
    (bytearray, bytearray, st.binary(max_size=8).map(bytearray)),
]
KEYS = [leaf for leaf in HASHED if leaf[0] is not bool]
NAMES = ["a", "b_c", "_private", "type", "value", "für"]


def _fields(draw: st.DrawFn, inner: st.SearchStrategy[Typed], names: list[str]) -> dict[str, Typed]:
    return {name: draw(inner) for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))}


def _build(kind: Callable[..., Any], fields: dict[str, Typed]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({name: values for name, (_, _, values) in fields.items()}).map(lambda got: kind(**got))


@st.composite
def dataclasses_(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    fields = _fields(draw, inner, NAMES)
    options: dict[str, Any] = draw(st.sampled_from([{}, {"frozen": True}, {"slots": True}, {"kw_only": True}]))
    kind = dataclasses.make_dataclass("Data", [(name, form) for name, (form, _, _) in fields.items()], **options)
    return kind, kind, _build(kind, fields)


@st.composite
def structs(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    fields = _fields(draw, inner, [name for name in NAMES if name != "_private"])
    options: dict[str, Any] = draw(st.sampled_from([{}, {"frozen": True}, {"array_like": True}, {"rename": "camel"}]))
    kind = msgspec.defstruct("Struct", [(name, form) for name, (form, _, _) in fields.items()], **options)
    return kind, kind, _build(kind, fields)


@st.composite
def typed_dicts(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    fields = _fields(draw, inner, NAMES)
    optional = draw(st.booleans())
    kind = TypedDict("Td", {name: form for name, (form, _, _) in fields.items()}, total=not optional)  # type: ignore[misc]
    values = {name: values for name, (_, _, values) in fields.items()}
    return kind, dict, st.fixed_dictionaries({}, optional=values) if optional else st.fixed_dictionaries(values)


@st.composite
def named_tuples(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    fields = _fields(draw, inner, ["a", "b", "c"])
    kind = NamedTuple("Nt", [(name, form) for name, (form, _, _) in fields.items()])  # type: ignore[misc]
    return kind, kind, _build(kind, fields)


@st.composite
def models(draw: st.DrawFn) -> Typed:
    leaves = st.sampled_from([leaf for leaf in HASHED if leaf[0] in (bool, int, float, str, UUID, date, Colour)])
    fields = _fields(draw, leaves, ["a", "b", "c"])
    definitions: dict[str, Any] = {name: (form, ...) for name, (form, _, _) in fields.items()}
    kind: Any = pydantic.create_model("Model", **definitions)
    return kind, kind, _build(kind, fields)


@st.composite
def containers(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    form, _, values = draw(inner)
    other, _, others = draw(inner)
    hashed, _, hashes = draw(st.sampled_from(HASHED))
    key, _, keys = draw(st.sampled_from(KEYS))
    generic: Any
    options: list[Typed] = []
    for generic, arguments, made in [
        (list, form, st.lists(values, max_size=3)),
        (tuple, (form, ...), st.lists(values, max_size=3).map(tuple)),
        (tuple, (form, other), st.tuples(values, others)),
        (set, hashed, st.sets(hashes, max_size=3)),
        (frozenset, hashed, st.frozensets(hashes, max_size=3)),
        (dict, (key, form), st.dictionaries(keys, values, max_size=3)),
        (Envelope, form, values.map(Envelope)),
    ]:
        options.append((generic[arguments], generic, made))
    return draw(st.sampled_from(options))


@st.composite
def optional(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    form, kind, values = draw(inner)
    return (form, kind, values) if form is Any else (Union[form, None], kind, st.one_of(st.none(), values))  # noqa: UP007


def typed(leaves: st.SearchStrategy[Typed], depth: int = 3) -> st.SearchStrategy[Typed]:
    inner = leaves
    for _ in range(depth - 1):
        options = [containers(inner), dataclasses_(inner), structs(inner), typed_dicts(inner), named_tuples(inner)]
        inner = st.one_of(leaves, *options, optional(inner))
    return inner


trees = st.recursive(finite.map(Tree), lambda inner: st.builds(Tree, finite, st.lists(inner, max_size=3)), max_leaves=6)
payloads = st.one_of(typed(st.sampled_from(LEAVES)), models(), st.just((Tree, Tree, trees)))


@st.composite
def unions(draw: st.DrawFn) -> tuple[Any, st.SearchStrategy[Any]]:
    """Two to four members, each with a class of its own, with or without None."""
    members: dict[object, Typed] = {}
    for form, kind, values in draw(st.lists(payloads, min_size=2, max_size=4)):
        name = getattr(kind, "__name__", kind)
        if kind not in (object, type(None)) and not (kind in (int, float) and {int, float} & members.keys()):
            members.setdefault(name if name in ("Data", "Struct", "Nt", "Model") else kind, (form, kind, values))
    if not members:
        members[int] = (int, int, st.integers())
    forms = [form for form, _, _ in members.values()]
    if draw(st.booleans()):
        return Union[(*forms, None)], st.one_of(st.none(), *(values for _, _, values in members.values()))
    return Union[tuple(forms)], st.one_of(*(values for _, _, values in members.values()))  # noqa: UP007


def same(one: Any, other: Any) -> bool:
    """Return whether both are equal, of the same classes down to the leaves, and at the same zone offset."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, (datetime, time)):
        return bool(one.replace(tzinfo=None) == other.replace(tzinfo=None) and one.utcoffset() == other.utcoffset())
    if isinstance(one, dict):
        ours, theirs = sorted(one, key=repr), sorted(other, key=repr)
        if any(isinstance(key, (datetime, time)) for key in ours):
            return bool(one == other)  # their order by text tells nothing where zones have names
        return same(ours, theirs) and all(same(one[a], other[b]) for a, b in zip(ours, theirs, strict=True))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, msgspec.Struct):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__)
    return bool(one == other)


def arrives(codec: BoundCodec, value: Any) -> Any:
    codec.check(value)
    body = codec.encode(value)
    assert body is None or isinstance(body, bytes)
    return codec.decode(body, codec.content_type, {})


many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@many
@given(st.data())
def test_every_supported_type_arrives_equal(data: st.DataObject) -> None:
    form, _, values = data.draw(payloads)
    codec = for_type(form)
    for _ in range(3):
        value = data.draw(values)
        got = arrives(codec, value)
        assert same(got, value), (form, value, got)


@many
@given(st.data())
def test_every_member_of_a_union_arrives_equal(data: st.DataObject) -> None:
    form, values = data.draw(unions())
    codec = for_type(form)
    for _ in range(3):
        value = data.draw(values)
        got = arrives(codec, value)
        assert same(got, value), (form, value, got)


def spoilt(value: Any) -> bool:
    """Return whether a number in *value* is none that JSON can carry into a float or a Decimal, or an offset has seconds."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Decimal):
        return not value.is_finite()
    if isinstance(value, (datetime, time)):
        offset = value.utcoffset()
        return offset is not None and offset.total_seconds() % 60 != 0
    if isinstance(value, dict):
        return any(map(spoilt, value)) or any(map(spoilt, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(spoilt, value))
    if dataclasses.is_dataclass(value):
        return any(spoilt(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, msgspec.Struct):
        return any(spoilt(getattr(value, name)) for name in value.__struct_fields__)
    return False


odd_zones: st.SearchStrategy[Any] = st.one_of(
    zones, st.integers(-80_000, 80_000).map(lambda seconds: timezone(timedelta(seconds=seconds)))
)
RISKY: list[Typed] = [
    (float, float, st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf]))),
    (Decimal, Decimal, st.decimals()),
    (datetime, datetime, st.datetimes(timezones=odd_zones)),
    (time, time, st.times(timezones=odd_zones.filter(lambda zone: not isinstance(zone, Summer)))),
    (str, str, text),
    (Any, object, st.one_of(plain_json, st.just(math.nan), st.just([math.inf]))),
]


@many
@given(st.data())
def test_what_json_would_change_is_refused_wherever_it_stands(data: st.DataObject) -> None:
    form, _, values = data.draw(typed(st.sampled_from(RISKY)))
    codec = for_type(form)
    value = data.draw(values)
    try:
        got = arrives(codec, value)
    except EncodeError:
        assert spoilt(value), (form, value)
    else:
        assert not spoilt(value), (form, value, got)
        assert same(got, value), (form, value, got)


nonsense = st.one_of(
    plain_json,
    st.sampled_from(
        [(1,), {1}, {1: 2}, {"a": (1,)}, b"x", Decimal(1), UTC, object(), 2.5 + 1j, range(3), Colour.RED, "\ud800"]
    ),
    st.dictionaries(st.one_of(st.integers(), text), st.one_of(plain_json, st.tuples(plain_json)), max_size=3),
    st.lists(st.one_of(plain_json, st.dates(), st.tuples(st.integers())), max_size=3),
)


@many
@given(nonsense)
def test_under_any_a_value_arrives_equal_or_is_refused(value: object) -> None:
    codec = for_type(Any)
    try:
        body = codec.encode(value)
    except EncodeError:
        return
    assert codec.decode(body, None, {}) == value


@many
@given(st.data())
def test_no_bytes_raise_anything_but_a_decode_error(data: st.DataObject) -> None:
    form, values = data.draw(st.one_of(unions(), payloads.map(lambda drawn: (drawn[0], drawn[2]))))
    codec = for_type(form)
    body = bytearray(codec.encode(data.draw(values)) or b"null")
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(body)))
        body[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        value = codec.decode(bytes(body), codec.content_type, {})
    except DecodeError:
        return
    codec.check(value)  # what it reads is of the type


@pytest.mark.parametrize("form", [bytes, str, Colour, int | None, dict[str, Any], Tree, Envelope[int] | Tree])
@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_no_random_bytes_raise_anything_but_a_decode_error(form: object, body: bytes) -> None:
    codec = for_type(form)
    with contextlib.suppress(DecodeError):
        codec.check(codec.decode(body, None, {}))
