"""Strict JSON, and typed access to the fields of an object."""

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rgexport.errors import RequestError
from rgexport.files.regular_file import read_regular

MAX_INTEGER, MAX_NUMBER = 2**31 - 1, 1e30
_Text = TypeVar("_Text", bound=str)


def read_json(path: Path) -> "Fields":
    """Reads the JSON object in a file.

    Raises:
        RequestError: the file cannot be read or holds something else.
    """
    try:
        values = strict_json(read_regular(path))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds {type(values).__name__}; expected a JSON object")
    return Fields(str(path), values)


def strict_json(text: bytes) -> Any:
    """Parses JSON in UTF-8; refuses duplicate keys, NaN, infinity and lone surrogates.

    Python's reader accepts all of these, and other readers would see something else.

    Raises:
        ValueError: it is not strict JSON.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(
        text.decode(),
        object_pairs_hook=_without_repeats,
        parse_constant=_refuse,
        parse_float=_finite,
        parse_int=_whole,
    )
    if b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


def _whole(number: str) -> int:
    _finite(number)  # other readers turn large integers into floats
    return int(number)


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"{number} is no number")


@dataclass(frozen=True)
class Fields:
    """A JSON object; `where` names it in errors. A field that is null counts as absent."""

    where: str
    values: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(
        self, name: str, default: Any, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """Returns a whole number in a range; `2560.0` is one."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not minimum <= value <= maximum:
            raise self.wrong(name, f"a whole number from {minimum} to {maximum}")
        return int(value)

    def number(self, name: str, default: Any, *, zero: bool = False) -> float:
        """Returns a number above 0 (or 0 if `zero`) and at most `MAX_NUMBER`."""
        value = self._get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= MAX_NUMBER or (value == 0 and not zero):
            raise self.wrong(name, f"a number {'of at least' if zero else 'above'} 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choices(self, name: str, allowed: tuple[_Text, ...]) -> tuple[_Text, ...]:
        """Returns a non-empty list of texts out of `allowed`."""
        value = self._get(name, None)
        is_valid = isinstance(value, list) and value and all(text in allowed for text in value)
        if not is_valid:
            raise self.wrong(name, f"a list of {' and '.join(map(repr, allowed))}")
        return tuple(value)

    def choice(self, name: str, default: Any, allowed: tuple[str, ...]) -> str:
        """Returns a text out of `allowed`."""
        value = self._get(name, default)
        if value not in allowed:
            raise self.wrong(name, " or ".join(map(repr, allowed)))
        return str(value)

    def object(self, name: str) -> "Fields":
        """Returns a nested object; empty if absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(f"{self.where}: {name}", value)

    def wrong(self, name: str, expected: str) -> RequestError:
        value = reprlib.repr(self.values.get(name))
        return RequestError(f"{self.where}: {name} is {value}; expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
