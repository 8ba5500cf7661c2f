"""Which payload types are supported, what is said of the others, and codecs of one's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Any, Generic, Literal, TypedDict, TypeVar

import msgspec
import pytest

from brokerkit.codecs import JSON, BoundCodec, for_type
from brokerkit.errors import BrokerError, ConfigError, DecodeError, EncodeError

X = TypeVar("X")


@dataclass
class Order:
    id: str


@dataclass
class Created:
    id: str


@dataclass
class Shipped:
    id: str


@dataclass
class Envelope(Generic[X]):
    data: X


class Td(TypedDict):
    a: int


class Plain:
    pass


MARK = object()


UNSUPPORTED: list[tuple[Any, str]] = [
    (Plain, "the payload type Plain is not supported; supported are dataclasses"),
    (object, "object is not supported"),
    (complex, "complex is not supported"),
    (range, "range is not supported"),
    (type, "type is not supported"),
    (Callable[[int], int], r"Callable\[\[int\], int\]"),
    (Iterable[int], r"Iterable\[int\]"),
    (memoryview, "memoryview is not supported"),
    (msgspec.Raw, "Raw is not supported"),
    ("Order", "'Order' is not supported"),
    (print, "is not supported"),
    (list[Plain], r"Plain \(at list\[Plain\]\[...\]\) is not supported"),
    (Envelope[Plain], r"Plain \(at Envelope\[Plain\].data\)"),
    (Plain | None, "Plain is not supported"),
    (Created | Plain, "Plain is not supported"),
    (dict[tuple[int, int], str], "keys that JSON cannot carry"),
    (dict[bool, str], "keys that JSON cannot carry"),
    (dict[int | str, str], "keys that JSON cannot carry"),
    (list[Created | Shipped], "a union may hold one class only"),
    (Envelope[Created | Shipped], "tag=True"),
    (Envelope[int] | Envelope[str], "two of its members are called Envelope"),
    (list[int] | list[str], "two of its members are called list"),
    (Td | dict[str, int], "does not tell"),
    (Created | Shipped | Any, "Any takes every other member"),
]


@pytest.mark.parametrize("form, text", UNSUPPORTED)
def test_an_unsupported_type_is_refused_by_name(form: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        for_type(form)


def test_more_unsupported_classes() -> None:
    class Fraction(Enum):
        HALF = 0.5

    @dataclass
    class WithInit:
        a: int
        b: InitVar[int] = 3

    @dataclass
    class Deep:
        a: list[dict[str, Plain]]

    @dataclass
    class Unresolved:
        a: Missing  # type: ignore[name-defined]  # noqa: F821

    for form, text in [
        (Fraction, "all str or all int"),
        (WithInit, "InitVar"),
        (Deep, r"Plain \(at Deep.a\[...\]\[...\]\)"),
        (Unresolved, "Missing"),
    ]:
        with pytest.raises(ConfigError, match=text):
            for_type(form)


def test_two_members_of_one_name_are_refused() -> None:
    def made() -> type:
        @dataclass
        class Created:
            id: str

        return Created

    with pytest.raises(ConfigError, match="two of its members are called Created"):
        for_type(Created | made())


def test_pydantic_is_not_imported_for_types_that_do_not_need_it() -> None:
    program = (
        "import sys\nfrom dataclasses import dataclass\nfrom brokerkit.codecs import for_type\n"
        "@dataclass\nclass A: a: int\n"
        "codec = for_type(A)\nassert codec.decode(codec.encode(A(1)), None, {}) == A(1)\n"
        "for_type(A | None), for_type(A | int), for_type(list[A])\n"
        "sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ------------------------------------------------------------------ a codec of one's own


class Upper:
    """Text in capitals; remembers the headers it saw."""

    content_type = "Text/X-Upper"

    def __init__(self) -> None:
        self.headers: Mapping[str, str] = {}

    def encode(self, value: Any) -> Any:
        return value.text.upper().encode() if value.text != "wrong" else "no bytes"

    def decode(self, body: bytes, headers: Mapping[str, str]) -> Any:
        self.headers = headers
        return Shouted(body.decode().lower())


class Shouted:
    def __init__(self, text: str) -> None:
        self.text = text


class Louder(Shouted):
    pass


@pytest.fixture
def own() -> tuple[Upper, BoundCodec]:
    codec = Upper()
    return codec, for_type(Shouted, codec)


def test_an_own_codec_carries_any_class(own: tuple[Upper, BoundCodec]) -> None:
    codec, bound = own
    assert bound.content_type == "text/x-upper"
    assert bound.encode(Shouted("abc")) == b"ABC"
    assert bound.encode(Louder("abc")) == b"ABC"
    assert bound.decode(b"ABC", "text/x-upper", {"h": "v"}).text == "abc"
    assert codec.headers == {"h": "v"}
    assert bound.decode(b"ABC", None, {}).text == "abc"


def test_errors_of_an_own_codec_are_ours(own: tuple[Upper, BoundCodec]) -> None:
    bound = own[1]
    with pytest.raises(EncodeError, match="of class str"):
        bound.encode("abc")
    with pytest.raises(EncodeError, match="of class str"):
        bound.check("abc")
    with pytest.raises(EncodeError, match="returned str instead of bytes"):
        bound.encode(Shouted("wrong"))
    with pytest.raises(EncodeError) as caught:
        bound.encode(Shouted(3))  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(DecodeError, match="utf-8"):
        bound.decode(b"\xff", None, {})
    with pytest.raises(DecodeError, match="application/json"):
        bound.decode(b"{}", JSON, {})
    with pytest.raises(DecodeError, match="no body"):
        bound.decode(None, None, {})


def test_an_own_codec_never_sees_none() -> None:
    bound = for_type(Shouted | None, Upper())
    assert bound.encode(None) is None
    assert bound.decode(None, None, {}) is None


@pytest.mark.parametrize("form", [Td, Literal["a"], Any, list[int], Created | Shipped])
def test_an_own_codec_is_given_only_values_of_the_type(form: Any) -> None:
    class Fixed:
        content_type = "x/y"

        def encode(self, value: Any) -> bytes:
            return b"!"

        def decode(self, body: bytes, headers: Mapping[str, str]) -> Any:
            return MARK

    bound = for_type(form, Fixed())
    good = {Td: {"a": 1}, Literal["a"]: "a", Any: Plain(), list[int]: [1], Created | Shipped: Shipped("a")}[form]
    assert bound.encode(good) == b"!"
    assert bound.decode(b"", None, {}) is MARK
    if form not in (Any, Literal["a"]):
        with pytest.raises(EncodeError):
            bound.encode(Plain())


@pytest.mark.parametrize("codec", [object(), Upper, "json", 3])
def test_what_is_no_codec_is_refused(codec: Any) -> None:
    with pytest.raises(ConfigError, match="codec"):
        for_type(Order, codec)


def test_every_error_is_of_our_tree() -> None:
    for kind in (EncodeError, DecodeError, ConfigError):
        assert issubclass(kind, BrokerError)
