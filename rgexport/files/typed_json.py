"""Strict JSON, and dataclasses as JSON and back; a complaint names the field.

msgspec names neither key nor value, takes NaN and rounds whole numbers. pydantic and cattrs go on
after the first mistake: 8 MB of them take 600 MB and 2 s, or 1 GB and 16 s.
"""

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular, report_os_errors

T = TypeVar("T")

ALSO = ". Also: "
_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
_READERS: dict[Any, Callable[[Any], Any]] = {}


class Mismatch(ValueError):
    """JSON that a type does not allow; the message names the fields."""


@dataclass(frozen=True)
class Between:
    """A closed range, for `Annotated[int, Between(1, 9)]`."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a number from {self.least} to {self.most}"


MAX_INTEGER, MAX_NUMBER, MIN_NUMBER = 2**31 - 1, 1e30, 1e-30
Size = Annotated[int, Between(1, MAX_INTEGER)]
Positive = Annotated[float, Between(MIN_NUMBER, MAX_NUMBER)]
NotNegative = Annotated[float, Between(0, MAX_NUMBER)]


def parse_json(text: bytes | str) -> Any:
    """Parses JSON; Mismatch for duplicate keys, NaN, infinity, and in bytes lone surrogates.

    A text from another file may have those, as a path has that is not UTF-8.
    """
    if not isinstance(text, bytes | str):  # GGUF's metadata have arrays, too
        raise Mismatch("not a text")
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
        if isinstance(text, bytes) and b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, TypeError, RecursionError) as error:
        raise Mismatch(f"not JSON ({error})") from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _finite(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _refuse(literal)


def _whole(literal: str) -> int:
    _finite(literal)  # other readers turn large integers into floats
    return int(literal)


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no number")


def read_json(path: Path) -> dict[str, Any]:
    try:
        with report_os_errors(path):
            fields = parse_json(read_regular(path))
    except Mismatch as error:
        raise RequestError(f"{path} is {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"{path} holds {type(fields).__name__}; expected a JSON object")
    return fields


def require_version(path: Path, version: Any, expected: int, advice: str) -> None:
    """Refuses another number of a format's version, for an older one with `advice`."""
    if type(version) is int and version != expected:
        raise RequestError(
            f"{path} has format version {version}; this rgexport reads {expected}: "
            + ("update rgexport" if version > expected else advice)
        )


def register_reader(kind: Any, reader: Callable[[Any], Any]) -> None:
    """Makes `from_json` read values of a type by `reader`, which raises RequestError."""
    _READERS[kind] = reader


def from_json(kind: type[T], value: Any) -> T:
    """Builds a `kind` from parsed JSON; Mismatch with the path of a wrong field: `states[3].shape`.

    It names all wrong fields of a dataclass, but of a list the first alone, as lists may be long.

    A type may be made of str, int, float, bool, None, Any, Literal, list, tuple, dict[str, X],
    unions of these, dataclasses, `Annotated` with a container of allowed values, and types with a
    registered reader. Unknown keys are ignored, so that a newer version may add some. A dataclass
    with `lenient = True`, for files of other programs, also takes null for a field that has a
    default and cannot be None, and numbers such as `2.0` as integers.
    """
    return typing.cast(T, _read(kind, value, ""))


def _read(kind: Any, value: Any, path: str) -> Any:
    if kind in _READERS:
        try:
            return _READERS[kind](value)
        except RequestError as error:
            raise Mismatch(f"{path}: {error}") from None
    if kind in _NAMES:
        return _scalar(kind, value, path)
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        allowed = inner[1]
        result = _read(inner[0], value, path)
        _require(result in allowed, path, value, str(allowed))
        return result
    if origin is Literal:
        known = any(value == choice and type(value) is type(choice) for choice in inner)
        choices = (repr(c) if isinstance(c, str) else json.dumps(c) for c in inner)
        _require(known, path, value, " or ".join(choices))
        return value
    if origin in (Union, types.UnionType):
        return _union(inner, value, path)
    if origin in (list, tuple):
        return origin(_items(inner, value, path))
    _require(isinstance(value, dict), path or "it", value, "an object")
    if origin is dict:
        return {k: _read(inner[1], item, f"{path}.{shown_key(k)}") for k, item in value.items()}
    return _dataclass(kind, value, path)


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is not float or type(value) not in (int, float):
        _require(type(value) is kind, path, value, _NAMES[kind])
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    exact = math.isfinite(number) and number == value
    _require(exact, path, value, "a finite number of double precision")
    return number


def _union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    options = [kind for kind in kinds if kind is not type(None)]
    return _read(next((kind for kind in options if type(value) is kind), options[0]), value, path)


def _items(kinds: tuple[Any, ...], value: Any, path: str) -> list[Any]:
    _require(isinstance(value, list), path, value, "a list")
    if len(kinds) == 1 or kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _require(len(value) == len(kinds), path, value, f"{len(kinds)} items")
    return [_read(kinds[i], item, f"{path}[{i}]") for i, item in enumerate(value)]


def _dataclass(kind: Any, value: dict[str, Any], path: str) -> Any:
    hints, fields, lenient = _hints(kind), {}, getattr(kind, "lenient", False)
    problems: list[str] = []
    for field in dataclasses.fields(kind):
        inner, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        has_default, item = field.default is not dataclasses.MISSING, value.get(field.name)
        if lenient and type(item) is float and item.is_integer():
            item = int(item)
        required = hint is not Any and type(None) not in typing.get_args(hint)
        is_null = lenient and item is None and has_default and required
        if field.name in value and not is_null:
            try:
                fields[field.name] = _read(hint, item, inner)
            except Mismatch as error:
                problems.append(str(error))
        elif not has_default:
            problems.append(f"{inner} is missing")
    if problems:
        raise Mismatch(ALSO.join(problems))
    return kind(**fields)


_hints = functools.lru_cache(functools.partial(typing.get_type_hints, include_extras=True))


def _require(condition: bool, path: str, value: Any, expected: str) -> None:
    if not condition:
        text = reprlib.repr(value)
        text = text if len(text) <= 40 else f"{text[:37]}..."
        raise Mismatch(f"{path} is {text}; expected {expected}")


def to_json(value: Any) -> Any:
    """Turns dataclasses and tuples into JSON's types, and a number that is not finite into null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown_key(key: str) -> str:
    return key if key.isprintable() else repr(key)
