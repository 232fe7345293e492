"""Dataclasses as JSON and back: read strictly, with complaints that name the place.

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
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union

from rgexport.errors import RequestError

T = TypeVar("T")

_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


class Mismatch(ValueError):
    """JSON that is not what a type says; the message names the place."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Builds typed values from parsed JSON.

    Types may be made of str, int, float, bool, None, Any, Literal, list, tuple[X, ...],
    dict[str, X], unions of these and dataclasses. Keys that a dataclass has no field for are
    ignored, so that a newer writer may add some.
    """

    special: Mapping[Any, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    """Types that are read by a function of their own, which raises RequestError."""

    def read(self, kind: type[T], value: Any, place: str = "") -> T:
        """Builds a `kind`.

        Raises:
            Mismatch: a missing field or a value of another type, with its place, such as
                `states[3].shape`.
        """
        return typing.cast(T, self._read(kind, value, place))

    def _read(self, kind: Any, value: Any, place: str) -> Any:
        if kind in self.special:
            return self._special(kind, value, place)
        if kind in _NAMES:
            return _scalar(kind, value, place)
        reader = _BY_ORIGIN.get(typing.get_origin(kind))
        if reader is not None:
            return reader(self, typing.get_args(kind), value, place)
        return value if kind is Any else self._dataclass(kind, value, place)

    def _special(self, kind: Any, value: Any, place: str) -> Any:
        try:
            return self.special[kind](value)
        except RequestError as error:
            raise Mismatch(f"{place}: {error}") from None

    def _list(self, kinds: tuple[Any, ...], value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise Mismatch(f"{place} is {_show(value)}; expected a list")
        return [self._read(kinds[0], item, f"{place}[{i}]") for i, item in enumerate(value)]

    def _tuple(self, kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
        return tuple(self._list(kinds, value, place))

    def _dict(self, kinds: tuple[Any, ...], value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Mismatch(f"{place} is {_show(value)}; expected an object")
        return {
            key: self._read(kinds[1], item, f"{place}.{label(key)}") for key, item in value.items()
        }

    def _literal(self, choices: tuple[Any, ...], value: Any, place: str) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            expected = " or ".join(str(choice) for choice in choices)
            raise Mismatch(f"{place} is {_show(value)}; expected {expected}")
        return value

    def _union(self, kinds: tuple[Any, ...], value: Any, place: str) -> Any:
        if value is None and type(None) in kinds:
            return None
        wanted = [kind for kind in kinds if kind is not type(None)]
        fitting = next((kind for kind in wanted if type(value) is kind), wanted[0])
        return self._read(fitting, value, place)

    def _dataclass(self, kind: Any, value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(f"{place or 'it'} is {_show(value)}; expected an object")
        hints = _hints(kind)
        fields = {}
        for field in dataclasses.fields(kind):
            there = f"{place}.{field.name}" if place else field.name
            if field.name in value:
                fields[field.name] = self._read(hints[field.name], value[field.name], there)
            elif field.default is dataclasses.MISSING:
                raise Mismatch(f"{there} is missing")
        return kind(**fields)


_hints = functools.lru_cache(typing.get_type_hints)


def _scalar(kind: type, value: Any, place: str) -> Any:
    if kind is float and type(value) in (int, float):
        return _finite(value, place)
    if type(value) is not kind:
        raise Mismatch(f"{place} is {_show(value)}; expected {_NAMES[kind]}")
    return value


def _finite(value: Any, place: str) -> float:
    """A number; Python's reader of JSON takes `NaN` and `1e999` too, which are none.

    Nor is a whole number what was written if a float would have to round it.
    """
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number != value:
        raise Mismatch(f"{place} is {_show(value)}; expected a finite number of double precision")
    return number


_BY_ORIGIN: dict[Any, Callable[[Reader, tuple[Any, ...], Any, str], Any]] = {
    Literal: Reader._literal,
    list: Reader._list,
    tuple: Reader._tuple,
    dict: Reader._dict,
    Union: Reader._union,
    types.UnionType: Reader._union,
}


def parse(text: Any) -> Any:
    """JSON that stands as a text in another file.

    Not `strict_json`: what ours writes of a path that is no UTF-8 has halves of surrogate pairs.

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
    """A key of somebody's JSON in a message: on one line, whatever it holds."""
    return key if key.isprintable() else repr(key)


def _show(value: Any) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
