"""Unions of payload types: their members, and how a value says on the wire which of them it is."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, NewType, TypeAlias, Union, get_args, get_origin

import msgspec

from ._json import classes, reader, shape_of, shown
from ._lossless import Check, checker
from .errors import ConfigError

Tags: TypeAlias = dict[type, tuple[Callable[[Any], Any], Check | None]]
"""By the class of a value: what wraps it, and what looks at it before."""


def members_of(form: object) -> tuple[list[Any], bool]:
    """Return the members of a union, nested ones and aliases opened, without None, and whether None was one."""
    if form is None or form is type(None):
        return [], True
    if type(form).__name__ == "TypeAliasType":  # of typing or of typing_extensions
        alias: Any = form
        return members_of(alias.__value__)
    if isinstance(form, NewType):
        return members_of(form.__supertype__)
    origin = get_origin(form)
    if origin is Union or origin is types.UnionType:
        parts = [members_of(part) for part in get_args(form)]
        members = [member for found, _ in parts for member in found]
        return [member for i, member in enumerate(members) if member not in members[:i]], any(null for _, null in parts)
    if origin is Annotated:
        members, nullable = members_of(get_args(form)[0])
        if nullable or len(members) != 1:
            return members, nullable
    if origin is Literal and None in get_args(form):
        rest = tuple(value for value in get_args(form) if value is not None)
        return ([Literal[rest]] if rest else []), True
    return [form], False


def union_of(members: list[Any], nullable: bool) -> Any:
    """Return the union of *members*, with None if *nullable*."""
    return Union[(*members, None)] if nullable else Union[tuple(members)]  # noqa: UP007  # the members are computed


def told_apart(union: Any) -> bool:
    """Return whether JSON tells the members of *union* apart."""
    try:
        reader(union)
    except TypeError:
        return False
    return True


def tags(form: object, members: list[Any]) -> Tags:
    """Return how each value of a union that JSON does not tell apart is wrapped.

    Raises:
        ConfigError: the class of a value does not tell the members apart either.
    """
    found: Tags = {}
    for name, member in _named(form, members).items():
        node = shape_of(member)
        kinds = classes(node)
        if kinds is None:
            raise ConfigError(f"the payload type {shown(form)} is not supported: Any takes every other member")
        if name == "Literal":
            kinds -= found.keys()  # Literal["a"] | str is str
        elif kinds & found.keys():
            raise ConfigError(
                f"the payload type {shown(form)} is not supported: the class of a value does not tell {shown(member)} "
                "from another member; use a class for each"
            )
        wrapper = msgspec.defstruct(name, [("value", member)], tag=name, tag_field="type", frozen=True)
        found |= dict.fromkeys(kinds, (wrapper, checker(node)))
    return found


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
