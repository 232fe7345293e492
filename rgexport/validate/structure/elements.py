"""The canonical form of a graph: its elements in order, without names that compute nothing.

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

from rgexport.artifacts.manifest import StoredTensor
from rgexport.errors import one_line

TOLERANCE = 1e-6
"""Relative difference of equal floats: the last bits of RoPE's depend on the machine."""
_MOST_TEXT = 80  # characters of a value that are kept, before a hash of it

Value = str | float
Content = tuple[Value, ...]
"""Texts, which are compared exactly, and finite floats. A text that ends in `:` names the field of
the values after it."""


@dataclass(frozen=True)
class Element:
    """One element of a structure, such as a node; `label` is what people call it."""

    label: str
    content: Content


@dataclass(frozen=True)
class Rules:
    """How a protobuf message becomes elements.

    A path is `CONTAINER.FIELD`: the field that holds the message, and one of the message's own. An
    entry of a map has the path `CONTAINER.FIELD.KEY` too. Fields that are `ignored` compute
    nothing, `names` have names of values, `elements` have elements, each with a label from its key
    in a map and the message. `simplify` is called with each message before it is read.
    """

    ignored: Collection[str]
    names: Collection[str]
    elements: Mapping[str, Callable[[str, Any], str]]
    simplify: Callable[[Any], None] = lambda message: None


def elements(message: Any, rules: Rules, interface: Iterable[str | bytes]) -> Iterator[Element]:
    """Reads a parsed model, which may be changed by it; names of the `interface` are kept.

    The last element has the fields outside of all others, the first one the size of unknown fields.
    """
    size = message.ByteSize()
    message.DiscardUnknownFields()
    yield Element("the model", ("unknown bytes:", str(size - message.ByteSize())))
    yield from _Reader(rules, interface).elements(message, "model", "")


class _Reader:
    def __init__(self, rules: Rules, interface: Iterable[str | bytes]) -> None:
        self._rules = rules
        # An empty name is no name: the input is left out.
        self._names = {name: repr(name) for name in ("", b"", *interface)}

    def elements(self, message: Any, container: str, label: str) -> Iterator[Element]:
        content: list[Value] = []
        yield from self._fields(message, container, label, content)
        yield Element(label or "the model", tuple(content))

    def _fields(
        self, message: Any, container: str, label: str, content: list[Value]
    ) -> Iterator[Element]:
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
                    inner = one_line(name(key, item))
                    inner = f"{label}: {inner}" if label else inner
                    yield from self.elements(item, field.name, inner)
                else:
                    yield from self._fields(item, field.name, label, content)
                content.append(")")

    def _scalars(self, path: str, value: Any) -> Iterator[Value]:
        single = isinstance(value, str | bytes) or not isinstance(value, Sequence)
        values = [value] if single else value
        if path in self._rules.names:
            yield from (self._names.setdefault(name, f"%{len(self._names)}") for name in values)
        elif isinstance(values[0], str | bytes):
            yield from (shortened(repr(text)) for text in values)
        elif len(values) > 1024:
            yield hashlib.sha256(np.array(values).tobytes()).hexdigest()
        else:
            finite = (isinstance(number, float) and math.isfinite(number) for number in values)
            yield from (x if keep else repr(x) for x, keep in zip(values, finite, strict=True))


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return sorted(value.items(), key=lambda entry: entry[0])
    return [("", item) for item in (value if isinstance(value, Sequence) else [value])]


def shortened(text: str) -> str:
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[:_MOST_TEXT]}… {hashlib.sha256(text.encode()).hexdigest()}"


def stored_elements(tensors: Mapping[str, StoredTensor]) -> Iterator[Element]:
    for name, stored in tensors.items():
        content: list[Value] = [repr(name)]
        for key, part in stored.parts.items():
            content += [f"{key}:", repr((part.file, part.offset, part.dtype, part.shape))]
        yield Element(f"the tensor {name}", tuple(content))


def first_difference(artifact: Iterable[Element], expected: Iterable[Element]) -> str | None:
    """Describes the first difference of two structures; None where they are equal."""
    for ours, theirs in zip_longest(artifact, expected):
        if ours is None:
            return f"{theirs.label} is missing"
        if theirs is None:
            return f"{ours.label} was added"
        if difference := _difference(ours.content, theirs.content):
            if ours.label != theirs.label:
                difference = f"it stands where {theirs.label} should"
            return one_line(f"{ours.label}: {difference}")
    return None


def _difference(artifact: Content, expected: Content) -> str:
    field = "form"
    for ours, theirs in zip_longest(artifact, expected):
        if isinstance(ours, str) and ours.endswith(":"):
            field = ours[:-1]
        if not _same(ours, theirs):
            return f"its {field} is {_value_text(ours)}; expected {_value_text(theirs)}"
    return ""


def _same(ours: Value | None, theirs: Value | None) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=TOLERANCE)
    return ours == theirs


def _value_text(value: Value | None) -> str:
    """One value of a content; names of values have numbers, and parentheses nothing to show."""
    text = "" if value is None else str(value).strip("():").removeprefix("b")
    return f"value {text[1:]}" if text[:1] == "%" else text or "none"


@dataclass(frozen=True)
class Fingerprint:
    """A structure in short: the key of its `Recipe`, and the SHA-256 of all elements.

    In the digest a float counts by where it appears first; `numbers` are all floats in that order.
    """

    recipe: str
    digest: str
    numbers: tuple[float, ...]

    def matches(self, other: "Fingerprint") -> bool:
        pairs = zip_longest(self.numbers, other.numbers)
        return self.digest == other.digest and all(_same(*pair) for pair in pairs)


def fingerprint(recipe: str, structure: Iterable[Element]) -> Fingerprint:
    digest, numbers = hashlib.sha256(), dict[float, int]()
    for element in structure:
        values = [
            numbers.setdefault(value, len(numbers)) if isinstance(value, float) else value
            for value in element.content
        ]
        digest.update(repr(values).encode())
    return Fingerprint(recipe, digest.hexdigest(), tuple(numbers))
