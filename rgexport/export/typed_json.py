"""Dataclasses as JSON and back, read strictly: a complaint names the place.

Why this is no library: msgspec names no key of an object (`$.tensors[...].shape`), nor what it
found, takes NaN and rounds whole numbers. pydantic and cattrs go on after the first mistake: 8 MB
with a mistake in each entry take 600 MB and 2 s, or 1 GB and 16 s; here they take nothing.
"""

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar, Union

from rgexport.errors import RequestError
from rgexport.quantize.scheme import Scheme, scheme_from_dict

T = TypeVar("T")

_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


class Mismatch(ValueError):
    """JSON that a type does not allow; the message names the place."""


def read(kind: type[T], value: Any) -> T:
    """Builds a `kind` from parsed JSON.

    A type may be made of str, int, float, bool, None, Any, Scheme, Literal, list, tuple[X, ...],
    dict[str, X], unions of these and dataclasses. Keys that are no field of a dataclass are
    ignored, so that a newer version may add some.

    Raises:
        Mismatch: a missing field or a value of another type, with its place, such as
            `states[3].shape`.
    """
    return typing.cast(T, _read(kind, value, ""))


def _read(kind: Any, value: Any, place: str) -> Any:
    if kind == Scheme:
        return _scheme(value, place)
    if kind in _NAMES:
        return _scalar(kind, value, place)
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _literal(inner, value, place)
    if origin in (Union, types.UnionType):
        return _union(inner, value, place)
    if origin in (list, tuple):
        _require(isinstance(value, list), place, value, "a list")
        return origin(_read(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    _require(isinstance(value, dict), place or "it", value, "an object")
    if origin is dict:
        return {key: _read(inner[1], item, f"{place}.{label(key)}") for key, item in value.items()}
    return _dataclass(kind, value, place)


def _scheme(value: Any, place: str) -> Scheme:
    try:
        return scheme_from_dict(value)
    except RequestError as error:
        raise Mismatch(f"{place}: {error}") from None


def _scalar(kind: type, value: Any, place: str) -> Any:
    if kind is float and type(value) in (int, float):
        return _finite(value, place)
    _require(type(value) is kind, place, value, _NAMES[kind])
    return value


def _finite(value: Any, place: str) -> float:
    """A finite float; an integer that a float would round is refused.

    Python's JSON reader also takes `NaN` and `1e999`.
    """
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    exact = math.isfinite(number) and number == value
    _require(exact, place, value, "a finite number of double precision")
    return number


def _literal(choices: tuple[Any, ...], value: Any, place: str) -> Any:
    known = any(value == choice and type(value) is type(choice) for choice in choices)
    _require(known, place, value, " or ".join(map(str, choices)))
    return value


def _union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    wanted = [kind for kind in kinds if kind is not type(None)]
    fitting = next((kind for kind in wanted if type(value) is kind), wanted[0])
    return _read(fitting, value, place)


def _dataclass(kind: Any, value: dict[str, Any], place: str) -> Any:
    hints, fields = _hints(kind), {}
    for field in dataclasses.fields(kind):
        there = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            fields[field.name] = _read(hints[field.name], value[field.name], there)
        elif field.default is dataclasses.MISSING:
            raise Mismatch(f"{there} is missing")
    return kind(**fields)


_hints = functools.lru_cache(typing.get_type_hints)


def _require(condition: bool, place: str, value: Any, expected: str) -> None:
    if not condition:
        shown = reprlib.repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise Mismatch(f"{place} is {shown}; expected {expected}")


def parse(text: Any) -> Any:
    """JSON that is a text in another file.

    Not `strict_json`: a path that is not UTF-8 is written with halves of surrogate pairs.

    Raises:
        Mismatch: it is no text, or no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Mismatch(f"it is not JSON ({error})") from None


def plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them; a number that is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def label(key: str) -> str:
    """A key of a JSON object as a message shows it: on one line."""
    return key if key.isprintable() else repr(key)
