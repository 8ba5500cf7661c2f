"""Payloads and addresses that the programs beside this file use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import msgspec
import pydantic

from brokerkit import Queue, Topic

X = TypeVar("X")


@dataclass
class Order:
    id: str
    total: float


@dataclass
class Email:
    to: str
    text: str


@dataclass
class Created:
    id: str


@dataclass
class Shipped:
    id: str


@dataclass
class Envelope(Generic[X]):
    data: X


@dataclass
class Base:
    id: str


@dataclass
class Derived(Base):
    more: int


class Row(TypedDict):
    a: int


class Point(NamedTuple):
    x: int


class Fast(msgspec.Struct):
    a: int


class Model(pydantic.BaseModel):
    a: int


class Database:
    """What a lifespan yields."""


ORDERS = Topic("orders", Order)
EVENTS = Topic("events", Created | Shipped)
FOREIGN = Topic("foreign", bytes, owned=False)
COMPACTED = Topic("compacted", bytes | None)

EMAILS = Queue("emails", Email)
ROWS = Queue("rows", Row)
POINTS = Queue("points", Point)
FASTS = Queue("fasts", Fast)
MODELS = Queue("models", Model)
ENVELOPES = Queue("envelopes", Envelope[int])
MAPS = Queue("maps", dict[str, Any])
LISTS = Queue("lists", list[Order])

QUOTES = Queue("quotes", Order, reply=float)
MAYBES = Queue("maybes", Order, reply=float | None)
