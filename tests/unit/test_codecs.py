"""What each payload type looks like on the wire, and the error for everything that cannot go over it."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, StrEnum
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import msgspec
import pydantic
import pytest
from typing_extensions import TypeAliasType

from brokerkit.codecs import BYTES, JSON, TEXT, for_type
from brokerkit.errors import DecodeError, EncodeError

X = TypeVar("X")


@dataclass
class Order:
    id: str
    total: float
    note: str = "none"


@dataclass
class Created:
    id: str


@dataclass
class Shipped:
    id: str


@dataclass
class CreatedLate(Created):
    late: bool = True


@dataclass
class Envelope(Generic[X]):
    data: X


class Point(NamedTuple):
    x: int
    y: int = 0


class Td(TypedDict):
    a: int


class Struct(msgspec.Struct):
    a: int


class Cat(msgspec.Struct, tag=True):
    name: str


class Dog(msgspec.Struct, tag=True):
    name: str


class Model(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")
    total: float | None = None


class Inner(pydantic.BaseModel):
    secret: int


class Colour(Enum):
    RED = "red"


class Word(StrEnum):
    YES = "yes"


class Berlin(tzinfo):
    """A zone with a name, with a rule, and with seconds before 1893; what machines know of zones differs."""

    def utcoffset(self, moment: datetime | None) -> timedelta:
        if moment is None or moment.year < 1893:
            return timedelta(minutes=53, seconds=28)
        return timedelta(hours=2 if 4 <= moment.month <= 9 else 1)

    def dst(self, moment: datetime | None) -> timedelta | None:
        return None

    def tzname(self, moment: datetime | None) -> str:
        return "Europe/Berlin"


class Plain:
    pass


@dataclass
class Node:
    value: int
    children: list[Node]


UserId = NewType("UserId", str)
Maybe = TypeAliasType("Maybe", Created | None)


def encode(form: object, value: object) -> bytes | None:
    return for_type(form).encode(value)


def decode(form: object, body: bytes | None, content_type: str | None = None) -> Any:
    return for_type(form).decode(body, content_type, {})


# ------------------------------------------------------------------ the wire


WIRE: list[tuple[Any, Any, bytes | None]] = [
    (Order, Order("o1", 10.0), b'{"id":"o1","total":10.0,"note":"none"}'),
    (Td, Td(a=1), b'{"a":1}'),
    (Point, Point(1, 2), b"[1,2]"),
    (Struct, Struct(1), b'{"a":1}'),
    (Model, Model(orderId=1), b'{"orderId":1,"total":null}'),
    (Envelope[int], Envelope(1), b'{"data":1}'),
    (list[Order], [Order("a", 1.5, "x")], b'[{"id":"a","total":1.5,"note":"x"}]'),
    (dict[str, Any], {"a": [1, None]}, b'{"a":[1,null]}'),
    (Any, {"a": [1, None]}, b'{"a":[1,null]}'),
    (bytes, b"\x00\xff", b"\x00\xff"),
    (bytes, b"", b""),
    (str, "für", "für".encode()),
    (UserId, "u1", b"u1"),
    (Annotated[str, "a name"], "ann", b"ann"),
    (Annotated[str, msgspec.Meta(max_length=3)], "ann", b'"ann"'),
    (Decimal, Decimal("1.50"), b'"1.50"'),
    (Colour, Colour.RED, b'"red"'),
    (Literal["a", 3], 3, b"3"),
    (bool, True, b"true"),
    (float, 1.0, b"1.0"),
    (int, 2**64, b"18446744073709551616"),
    (int | str, 1, b"1"),
    (int | str, "1", b'"1"'),
    (int | float, 1.0, b"1.0"),
    (list[bytes], [b"\xff"], b'["/w=="]'),
    (dict[int, str], {1: "a"}, b'{"1":"a"}'),
    # None has no body.
    (None, None, None),
    (Order | None, None, None),
    (bytes | None, None, None),
    (bytes | None, b"", b""),
    (str | None, None, None),
    (str | None, "", b""),
    (Maybe, None, None),
    (Maybe, Created("a"), b'{"id":"a"}'),
    (Any, None, None),
    (Created | Shipped | None, None, None),
    (Literal["a", None], None, None),
    (Literal["a", None], "a", b'"a"'),
    (Model | None, None, None),
    # JSON tells these apart.
    (Cat | Dog, Dog("rex"), b'{"type":"Dog","name":"rex"}'),
    (Order | None, Order("a", 1.0, ""), b'{"id":"a","total":1.0,"note":""}'),
    (Created | str | list[int], [1], b"[1]"),
    # These it does not.
    (Created | Shipped, Created("a"), b'{"type":"Created","value":{"id":"a"}}'),
    (Created | Shipped, Shipped("a"), b'{"type":"Shipped","value":{"id":"a"}}'),
    (Created | Shipped | int, 7, b'{"type":"int","value":7}'),
    (Created | CreatedLate, CreatedLate("a"), b'{"type":"CreatedLate","value":{"id":"a","late":true}}'),
    (Created | Struct, Struct(1), b'{"type":"Struct","value":{"a":1}}'),
    (Created | Model, Model(orderId=1), b'{"type":"Model","value":{"orderId":1,"total":null}}'),
    (Created | Td, Td(a=1), b'{"type":"Td","value":{"a":1}}'),
    (Created | Envelope[int], Envelope(1), b'{"type":"Envelope","value":{"data":1}}'),
    (Created | dict[str, int], {"a": 1}, b'{"type":"dict","value":{"a":1}}'),
    (str | bytes, b"\xff", b'{"type":"bytes","value":"/w=="}'),
    (str | datetime, "x", b'{"type":"str","value":"x"}'),
    (set[int] | list[int], {1}, b'{"type":"set","value":[1]}'),
    (Created | Shipped | Literal["a", 3], "a", b'{"type":"Literal","value":"a"}'),
    (str | Literal["a"] | Created | Shipped, "a", b'{"type":"str","value":"a"}'),
]


@pytest.mark.parametrize("form, value, body", WIRE)
def test_has_this_body_and_arrives_equal(form: Any, value: Any, body: bytes | None) -> None:
    codec = for_type(form)
    codec.check(value)
    assert codec.encode(value) == body
    got = codec.decode(body, codec.content_type, {})
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "form, content_type",
    [
        (bytes, BYTES),
        (bytes | None, BYTES),
        (str, TEXT),
        (Order, JSON),
        (Model, JSON),
        (Created | Shipped, JSON),
        (int, JSON),
    ],
)
def test_the_content_type_follows_the_payload_type(form: Any, content_type: str) -> None:
    assert for_type(form).content_type == content_type


def test_a_json_null_is_none_where_none_is_admitted() -> None:
    assert decode(Order | None, b"null") is None
    assert decode(Created | Shipped | None, b"null") is None
    with pytest.raises(DecodeError):
        decode(Order, b"null")
    with pytest.raises(DecodeError):
        decode(Created | Shipped, b"null")


@pytest.mark.parametrize("form", [Order, bytes, str, Model, int, Created | Shipped, dict[str, Any], list[int | None]])
def test_a_record_without_body_is_refused_where_none_is_not_admitted(form: Any) -> None:
    with pytest.raises(DecodeError, match="has no body"):
        decode(form, None)


# ------------------------------------------------------------------ on publish


REFUSED: list[tuple[Any, Any, str]] = [
    (Order, Created("a"), "of class Created was given, the address carries Order"),
    (Order, None, "of class NoneType was given"),
    (Order, {"id": "a", "total": 1.0}, "of class dict was given"),
    (Created, CreatedLate("a"), r"would arrive as Created; declare the address for Created \| CreatedLate"),
    (Created | Shipped, Order("a", 1.0), r"carries Created \| Shipped"),
    (Created | Shipped, CreatedLate("a"), "would arrive as Created"),
    (bytes, "text", "carries bytes"),
    (bytes, bytearray(b"x"), "of class bytearray"),
    (str, b"bytes", "carries str"),
    (str | None, 3, r"carries str \| None"),
    (str, "\ud800", "surrogates"),
    (Created, Created("\ud800"), "surrogates"),
    (Any, "\ud800", "surrogates"),
    (int, True, "of class bool"),
    (int, 1.0, "of class float"),
    (float, True, "of class bool"),
    (bool, 1, "of class int"),
    (Td, [("a", 1)], "of class list"),
    (list[int], (1,), r"of class tuple was given, the address carries list\[int\]"),
    (tuple[int, ...], [1], "of class list"),
    (Sequence[int], (1,), "of class tuple"),
    (Literal["a", 3], "b", "is not one of"),
    (Literal[1], True, "of class bool"),
    (Colour, "red", "of class str"),
    (Envelope[int], Order("a", 1.0), "of class Order"),
    (Model, Inner(secret=1), "of class Inner"),
    (Model, Model(orderId=1, total=math.nan), "not finite"),
    (Order, Order("a", math.nan), "not finite"),
    (Order, Order("a", math.inf), "not finite"),
    (Order, Order("a", 2**53 + 1), "an int that no float equals"),
    (Order, Order("a", 10**400), "too large"),
    (Order, Order("a", "b"), "a float in it is a str"),  # type: ignore[arg-type]
    (Order, Order("a", True), "a float in it is a bool"),
    (float, math.nan, "not finite"),
    (list[float], [1.0, math.nan], "not finite"),
    (dict[str, float], {"a": math.inf}, "not finite"),
    (dict[float, str], {math.inf: "a"}, "not finite"),
    (set[float], {math.nan}, "not finite"),
    (tuple[str, float], ("a", math.nan), "not finite"),
    (float | None, math.nan, "not finite"),
    (int | float, math.nan, "not finite"),
    (list[float | None], [None, math.nan], "not finite"),
    (Envelope[list[Order]], Envelope([Order("a", math.nan)]), "not finite"),
    (Created | Order, Order("a", math.nan), "not finite"),
    (Created | Model, Model(orderId=1, total=math.nan), "not finite"),
    (list[Model], [Model(orderId=1, total=math.nan)], "not finite"),
    (Any, math.nan, "would change"),
    (dict[str, Any], {"a": [math.inf]}, "would change"),
    (dict[str, Any], {"a": (1,)}, "would change"),
    (dict[str, Any], {1: "a"}, "would change"),
    (dict[str, Any], {1: "a", "1": "b"}, "would change"),
    (dict[str, str], {1: "a", "1": "b"}, "expected str instance, int found"),
    (dict[str, Any], {"a": datetime(2020, 1, 1)}, "would change"),
    (Envelope, Envelope((1,)), "would change"),
    (Decimal, Decimal("NaN"), "not finite"),
    (list[Decimal], [Decimal("-Infinity")], "not finite"),
    (datetime, datetime(1880, 1, 1, tzinfo=Berlin()), "offset in it has seconds"),
    (list[datetime], [datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=1)))], "offset in it has seconds"),
    (dict[str, Any], {"a": Plain()}, "Plain"),
    (Any, Plain(), "Plain"),
]


@pytest.mark.parametrize("form, value, text", REFUSED)
def test_refuses_what_would_not_arrive_as_it_is(form: Any, value: Any, text: str) -> None:
    with pytest.raises(EncodeError, match=text):
        encode(form, value)


@pytest.mark.parametrize("form", [bytes, str, Order, Model, Created | Shipped, list[int], float, Literal["a"]])
def test_check_alone_refuses_other_classes(form: Any) -> None:
    with pytest.raises(EncodeError, match="was given"):
        for_type(form).check(Plain())


def test_what_arrives_equal_as_the_plain_class_may_be_published() -> None:
    for form, value in [
        (str, Word.YES),
        (dict[str, int], collections.defaultdict(int, a=1)),
        (dict[str, Any], collections.OrderedDict(a=1)),
        (int | None, Size.BIG),
        (list[int], Numbers([1])),
        (float, 3),
        (float | None, 3),
        (float | Created | Shipped, 3),
        (str | bytes, Word.YES),
        (Order, Order("a", 3)),
    ]:
        codec = for_type(form)
        codec.check(value)
        assert codec.decode(codec.encode(value), None, {}) == value


class Size(int, Enum):
    BIG = 3


class Numbers(list[int]):
    pass


def test_too_deep_is_an_error_of_ours_both_ways() -> None:
    deep: Any = []
    node = Node(1, [])
    for _ in range(100_000):
        deep, node = [deep], Node(1, [node])
    with pytest.raises(EncodeError, match="nested too deeply"):
        encode(Any, deep)
    with pytest.raises(EncodeError, match="nested too deeply"):
        encode(Node, node)
    while node.children:  # or freeing it would recurse as deeply
        node = node.children.pop()
    for body in (b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000):
        with pytest.raises(DecodeError):
            decode(Any, body)
    with pytest.raises(DecodeError):
        decode(Node, b'{"value":1,"children":[' * 100_000 + b"]}" * 100_000)
    with pytest.raises(DecodeError, match="nested too deeply"):
        decode(list[Any], b"[" * 100_000 + b"]" * 100_000)


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(EncodeError, match="in itself"):
        encode(list[Any], loop)


def test_only_fields_are_written() -> None:
    @dataclass
    class Rich:
        a: int
        _b: int
        c: int = field(init=False, default=3)

        @cached_property
        def cached(self) -> int:
            return 9

    rich = Rich(1, 2)
    rich.c = 4
    assert rich.cached == 9
    codec = for_type(Rich)
    assert codec.encode(rich) == b'{"a":1,"_b":2,"c":4}'
    assert codec.decode(codec.encode(rich), None, {}) == rich


def test_zones_arrive_as_their_offset_and_naive_times_stay_naive() -> None:
    codec = for_type(datetime)
    berlin = datetime(2024, 6, 1, 12, tzinfo=Berlin())
    got = codec.decode(codec.encode(berlin), None, {})
    assert got == berlin
    assert got.utcoffset() == timedelta(hours=2)
    naive = codec.decode(codec.encode(datetime(2024, 6, 1, 12)), None, {})
    assert naive == datetime(2024, 6, 1, 12)
    assert naive.tzinfo is None
    assert codec.decode(codec.encode(datetime(2024, 6, 1, tzinfo=UTC)), None, {}).tzinfo == UTC


def test_integers_beyond_64_bits_are_exact_in_both_directions() -> None:
    big = 123456789012345678901234567890
    for form, value in [(int, big), (Any, -big), (dict[str, Any], {"a": big}), (Envelope[int], Envelope(big))]:
        codec = for_type(form)
        assert codec.decode(codec.encode(value), None, {}) == value
    assert decode(Any, b"123456789012345678901234567890") == big


# ------------------------------------------------------------------ on receipt


UNREADABLE: list[tuple[Any, bytes, str]] = [
    (Order, b"", "the body is no Order"),
    (Order, b"{}", "missing required field `id`"),
    (Order, b'{"id":1,"total":1.0}', r"Expected `str`, got `int` - at `\$.id`"),
    (Order, b'{"id":"a","total":"1"}', "Expected `float`, got `str`"),
    (Order, b'{"id":"a","total":null}', "got `null`"),
    (Order, b'{"id":"a","total":1e999}', "out of range"),
    (Order, b'{"id":"a","total":NaN}', "malformed"),
    (Order, b'{"id":"a","total":1.0}x', "malformed"),
    (Order, b'{"id":"\xff","total":1.0}', "utf-8"),
    (Order, b'{"id":"\\ud800","total":1.0}', "the body is no Order"),
    (Any, b'["\xff"]', "utf-8"),
    (Any, b"NaN", "malformed"),
    (str, b"\xff", "utf-8"),
    (int, b"true", "Expected `int`, got `bool`"),
    (int, b"1.0", "Expected `int`, got `float`"),
    (bool, b"1", "Expected `bool`"),
    (Annotated[str, msgspec.Meta(max_length=3)], b'"long"', "length <= 3"),
    (Created | Shipped, b'{"id":"a"}', "missing required field `type`"),
    (Created | Shipped, b'{"type":"Order","value":{}}', "Order"),
    (Created | Shipped, b'{"type":"Shipped","value":{"id":1}}', r"Expected `str`, got `int` - at `\$.value.id`"),
    (Model, b'{"orderId":"x"}', "valid integer"),
    (Model, b'{"order_id":1}', "Field required"),
    (Model, b"\xff", "the body is no Model"),
    (list[Model], b'[{"orderId":"x"}]', "valid integer"),
]


@pytest.mark.parametrize("form, body, text", UNREADABLE)
def test_a_body_that_is_not_of_the_type_is_refused(form: Any, body: bytes, text: str) -> None:
    with pytest.raises(DecodeError, match=text):
        decode(form, body)


def test_unknown_fields_are_ignored_missing_ones_take_their_default_and_the_last_of_two_wins() -> None:
    assert decode(Order, b'{"id":"a","total":1,"more":[1]}') == Order("a", 1.0, "none")
    assert decode(Created | Shipped, b'{"more":1,"value":{"id":"a","x":2},"type":"Shipped"}') == Shipped("a")
    assert decode(Model, b'{"orderId":1,"more":2}') == Model(orderId=1)
    assert decode(Order, b'{"id":"a","id":"b","total":1}') == Order("b", 1.0)


def test_what_a_payload_class_raises_is_a_decode_error() -> None:
    @dataclass
    class Picky:
        a: int

        def __post_init__(self) -> None:
            if self.a == 1:
                raise LookupError("not one")

    with pytest.raises(DecodeError, match="not one"):
        decode(Picky, b'{"a":1}')
    assert decode(Picky, b'{"a":2}') == Picky(2)


def test_the_errors_of_pydantic_show_no_values() -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Inner, b'{"secret":"hunter2"}')
    seen: BaseException | None = caught.value
    texts = []
    while seen is not None:
        texts.append(repr(seen))
        seen = seen.__cause__ or seen.__context__
    assert len(texts) == 2
    assert "hunter2" not in " ".join(texts)


@pytest.mark.parametrize(
    "form, own", [(Order, JSON), (bytes, BYTES), (str, TEXT), (Model, JSON), (Created | Shipped, JSON)]
)
def test_another_content_type_is_refused_by_name(form: Any, own: str) -> None:
    with pytest.raises(DecodeError, match=f"'application/x-pickle'.*'{own}'"):
        decode(form, b"{}", "application/x-pickle")


def test_content_types_are_compared_without_case_and_parameters() -> None:
    assert decode(Td, b'{"a":1}', "Application/JSON; charset=utf-8") == {"a": 1}
    assert decode(str, b"x", "text/plain;charset=utf-8") == "x"
    with pytest.raises(DecodeError):
        decode(str, b"x", "text/plainer")
