"""Typed access to the fields of a JSON object."""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rgexport.errors import RequestError
from rgexport.files.typed_json import MAX_INTEGER, MAX_NUMBER, read_json

_Word = TypeVar("_Word", bound=str)


def read_fields(path: Path) -> "Fields":
    return Fields(str(path), read_json(path))


@dataclass(frozen=True)
class Fields:
    """A JSON object; `where` names it in errors. A field that is null counts as absent."""

    where: str
    values: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(
        self, name: str, default: Any, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """A whole number in a range; `2560.0` is one."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not minimum <= value <= maximum:
            raise self.wrong(name, f"a whole number from {minimum} to {maximum}")
        return int(value)

    def number(self, name: str, default: Any, *, zero: bool = False) -> float:
        """A number above 0 (or 0 if `zero`) and at most `MAX_NUMBER`."""
        value = self._get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= MAX_NUMBER or (value == 0 and not zero):
            raise self.wrong(name, f"a number {'of at least' if zero else 'above'} 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def words(self, name: str, allowed: tuple[_Word, ...]) -> tuple[_Word, ...]:
        """A non-empty list of words out of `allowed`."""
        value = self._get(name, None)
        good = isinstance(value, list) and value and all(word in allowed for word in value)
        if not good:
            raise self.wrong(name, f"a list of {' and '.join(repr(word) for word in allowed)}")
        return tuple(value)

    def word(self, name: str, default: Any, allowed: tuple[str, ...]) -> str:
        """One word out of `allowed`."""
        value = self._get(name, default)
        if value not in allowed:
            raise self.wrong(name, " or ".join(repr(word) for word in allowed))
        return str(value)

    def object(self, name: str) -> "Fields":
        """A nested object; empty if absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(f"{self.where}: {name}", value)

    def wrong(self, name: str, expected: str) -> RequestError:
        """The error that says that a field has a wrong value."""
        found = reprlib.repr(self.values.get(name))
        return RequestError(f"{self.where}: {name} is {found}; expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
