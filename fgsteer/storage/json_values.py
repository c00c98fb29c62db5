"""Frozen dataclasses from plain JSON, by their annotations: the way back from ``dataclasses.asdict``.

value_of(Receipt, read_json("receipt.json"), "receipt")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 1e100
LEVELS = 64  # of lists and objects inside each other, which copies go down by recursion


def value_of(kind: Any, value: Any, name: str, *, nan_for_null: bool = False) -> Any:
    """A value of an annotation, from plain JSON that is not trusted.

    Args:
        kind: A dataclass, a plain type, or a tuple, dict, Literal or optional of these.
        value: The JSON. Keys that a dataclass does not have are left out.
        name: What the value is called in errors.
        nan_for_null: Whether null, in the place of a number that is not optional, is nan.

    Raises:
        TypeError, ValueError, KeyError: It is not such a value.
    """

    def each(one: Any, entry: Any, called: str) -> Any:
        return value_of(one, entry, called, nan_for_null=nan_for_null)

    origin = get_origin(kind)
    if kind is Any:
        _check_depth(value, name)
        return value
    if origin in (UnionType, Union):
        kinds = [one for one in get_args(kind) if one is not NoneType]
        return None if value is None else each(kinds[0], value, name)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r:.40}")
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is no object")
        hints = _hints(kind)
        return kind(**{f.name: each(hints[f.name], value[f.name], f.name) for f in fields(kind) if f.name in value})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is no list")
        entries = get_args(kind)
        kinds = [entries[0]] * len(value) if entries[-1] is Ellipsis else list(entries)
        return tuple(each(one, entry, name) for one, entry in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is no object")
        return {str(key): each(get_args(kind)[1], entry, name) for key, entry in value.items()}
    return _plain_value(kind, value, name, nan_for_null)


_hints = cache(get_type_hints)


def _check_depth(value: Any, name: str, levels: int = LEVELS) -> None:
    """Raises ValueError for lists and objects inside each other, more than so many levels deep."""
    if isinstance(value, Mapping | list | tuple):
        if not levels:
            raise ValueError(f"{name} is nested more than {LEVELS} levels deep")
        for entry in value.values() if isinstance(value, Mapping) else value:
            _check_depth(entry, name, levels - 1)


def _plain_value(kind: type, value: Any, name: str, nan_for_null: bool) -> Any:
    """A number, a text or a truth value. Raises TypeError, ValueError."""
    if kind is float and value is None and nan_for_null:
        return math.nan
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= LARGEST:
            raise ValueError(f"{name} is not finite, or too large for sums of it to be")
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} is {value!r:.40}")
    return value
