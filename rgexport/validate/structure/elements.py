"""The canonical form of a graph: its parts in order, without names and texts that compute nothing.

Two graphs of one form compute the same. The name of a value counts by where it appears first, so
that any renaming gives the same form.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from rgexport.errors import one_line
from rgexport.export.manifest import StoredTensor

TOLERANCE = 1e-6
"""Relative difference of equal floats: the last bits of RoPE's depend on the machine."""
_MOST_NUMBERS = 1024
"""Numbers of one array that are kept; of a longer one there is a hash."""
_MOST_TEXT = 80
"""Characters of a value that are kept, before a hash of it."""

Content = tuple[str | float, ...]


@dataclass(frozen=True)
class Element:
    """One part of a structure, such as a node.

    Attributes:
        place: what people call it; not compared.
        content: texts, which are compared exactly, and finite floats. A text that ends in `:` is a
            field, whose values follow.
    """

    place: str
    content: Content


@dataclass(frozen=True)
class Rules:
    """How a protobuf message becomes elements.

    A path is `CONTAINER.FIELD`: the field that holds the message, and one of the message's own. An
    entry of a map has the path `CONTAINER.FIELD.KEY` too.

    Attributes:
        ignored: fields by name or path that compute nothing.
        names: paths of fields with names of values.
        elements: paths of fields whose messages are elements of their own → what people call one,
            from its key in a map and the message.
        simplify: called with each message before it is read.
    """

    ignored: Collection[str]
    names: Collection[str]
    elements: Mapping[str, Callable[[str, Any], str]]
    simplify: Callable[[Any], None] = lambda message: None


def elements(message: Any, rules: Rules, interface: Iterable[str | bytes]) -> Iterator[Element]:
    """Reads a parsed model, which may be changed by it; names of the `interface` count as they are.

    The last element has what belongs to no other, and fields that the message's schema lacks.
    """
    size = message.ByteSize()
    message.DiscardUnknownFields()
    yield Element("the model", ("unknown bytes:", str(size - message.ByteSize())))
    yield from _Reader(rules, interface).elements(message, "model", "")


class _Reader:
    """Reads one message, with the number of each value's name."""

    def __init__(self, rules: Rules, interface: Iterable[str | bytes]) -> None:
        self._rules = rules
        # An empty name is no name: the input is left out.
        self._names = {name: repr(name) for name in ("", b"", *interface)}

    def elements(self, message: Any, container: str, place: str) -> Iterator[Element]:
        """The elements in a message, followed by one of the rest of it."""
        content: list[str | float] = []
        yield from self._fields(message, container, place, content)
        yield Element(place or "the model", tuple(content))

    def _fields(
        self, message: Any, container: str, place: str, content: list[str | float]
    ) -> Iterator[Element]:
        """Appends the fields to `content`; gives the elements in them."""
        rules = self._rules
        rules.simplify(message)
        for field, value in message.ListFields():
            path = f"{container}.{field.name}"
            if field.name in rules.ignored or path in rules.ignored:
                continue
            content.append(f"{field.name}:")
            if field.message_type is None:
                content += self._scalars(path, value)
                continue
            for key, item in _entries(value):
                if f"{path}.{key}" in rules.ignored:
                    continue
                content += [f"{key!r}:"] * bool(key) + ["("]
                if name := rules.elements.get(path):
                    label = one_line(name(key, item))
                    label = f"{place}: {label}" if place else label
                    yield from self.elements(item, field.name, label)
                else:
                    yield from self._fields(item, field.name, place, content)
                content.append(")")

    def _scalars(self, path: str, value: Any) -> Iterator[str | float]:
        """The contents of a field that holds no messages."""
        single = isinstance(value, str | bytes) or not isinstance(value, Sequence)
        values = [value] if single else value
        if path in self._rules.names:
            yield from (self._names.setdefault(name, f"%{len(self._names)}") for name in values)
        elif isinstance(values[0], str | bytes):
            yield from (shortened(repr(text)) for text in values)
        elif len(values) > _MOST_NUMBERS:
            yield hashlib.sha256(np.array(values).tobytes()).hexdigest()
        else:
            yield from (each if _is_finite_float(each) else repr(each) for each in values)


def _entries(value: Any) -> list[tuple[str, Any]]:
    """The messages of a field; those of a map with their keys, which have no order of their own."""
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda entry: entry[0])
    return [("", item) for item in (value if isinstance(value, Sequence) else [value])]


def _is_finite_float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def shortened(text: str) -> str:
    """A text whose end is replaced by a hash where it is long."""
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}… {hashlib.sha256(text.encode()).hexdigest()}"


def stored_elements(tensors: Mapping[str, StoredTensor]) -> Iterator[Element]:
    """Where each weight is stored."""
    for name, stored in tensors.items():
        content: list[str | float] = [repr(name)]
        for label, part in stored.parts.items():
            content += [f"{label}:", repr((part.file, part.offset, part.dtype, part.shape))]
        yield Element(f"the tensor {name}", tuple(content))


def first_difference(found: Iterable[Element], expected: Iterable[Element]) -> str | None:
    """The first difference of two structures in words; None where they are equal."""
    for one, other in zip_longest(found, expected):
        if one is None:
            return f"{other.place} is missing"
        if other is None:
            return f"{one.place} was added"
        if difference := _difference(one.content, other.content):
            if one.place != other.place:
                difference = f"it stands where {other.place} should"
            return one_line(f"{one.place}: {difference}")
    return None


def _difference(found: Content, expected: Content) -> str:
    """The first difference of two contents in words; empty where they are equal."""
    field = "form"
    for one, other in zip_longest(found, expected):
        if isinstance(one, str) and one.endswith(":"):
            field = one[:-1]
        if not _same(one, other):
            return f"its {field} is {_shown(one)}; expected {_shown(other)}"
    return ""


def _same(one: str | float | None, other: str | float | None) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE)
    return one == other


def _shown(value: str | float | None) -> str:
    """One value of a content; names of values have numbers, and parentheses nothing to show."""
    text = "" if value is None else str(value).strip("():").removeprefix("b")
    return f"value {text[1:]}" if text[:1] == "%" else text or "none"


@dataclass(frozen=True)
class Fingerprint:
    """A structure in short.

    Attributes:
        recipe: the key of the `Recipe` that it is made of.
        digest: SHA-256 of all elements; a float counts by where it appears first.
        numbers: all floats, in that order.
    """

    recipe: str
    digest: str
    numbers: tuple[float, ...]

    def matches(self, other: "Fingerprint") -> bool:
        """Whether both are of equal structures."""
        pairs = zip_longest(self.numbers, other.numbers)
        return self.digest == other.digest and all(_same(*pair) for pair in pairs)


def fingerprint(recipe: str, found: Iterable[Element]) -> Fingerprint:
    """The fingerprint of a structure."""
    digest, numbers = hashlib.sha256(), dict[float, int]()
    for element in found:
        values = [
            numbers.setdefault(value, len(numbers)) if isinstance(value, float) else value
            for value in element.content
        ]
        digest.update(repr(values).encode())
    return Fingerprint(recipe, digest.hexdigest(), tuple(numbers))
