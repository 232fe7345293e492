"""What one rendering of a chat template may take: everything that it makes is paid for.

A template is a program that comes with a download. Few operators are enough to fill any memory
(`'a' * 10**10`, a list that holds another one twice, thirty times over) or to run for ever. So
each result is measured as the text that it could become, before it exists where it may be large.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

BYTES = 16 << 20
"""That a rendering may make, beside `PER_BYTE` of its messages' own, which the user has typed."""
PER_BYTE = 64
SECONDS = 5.0
MAX_INTEGER = 1 << 16
"""That a method or filter may be given: a width or a count."""
MAX_BITS = 1 << 12
"""Of a whole number."""
STEP = 16
"""What an operation costs by itself."""
_ITEM = 64

_WIDE_FORMAT = re.compile(r"\d{5}|\*|\{[^{}]*\{")
"""Widths of many digits, or that are taken from a value."""

Texts = str | bytes | bytearray
_Functions = FunctionType | BuiltinFunctionType | MethodType | type


class Budget:
    """What is left to one rendering."""

    def __init__(self, messages: Any) -> None:
        self.left = self._all = sys.maxsize
        self.left = self._all = BYTES + PER_BYTE * self._measure(messages)
        self._deadline = time.monotonic() + SECONDS

    def charge(self, count: int = 0) -> None:
        """Takes a step, and `count` bytes.

        Raises:
            TemplateError: there is not so much left, or no time.
        """
        self.left -= STEP + count
        if self.left < 0:
            raise TemplateError(f"it makes more than {self._all} bytes of text and lists")
        if time.monotonic() > self._deadline:
            raise TemplateError(f"it runs longer than {SECONDS:g} s")

    def made(self, value: Any) -> Any:
        """`value`, paid for."""
        if isinstance(value, Texts):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, int):
            self.charge(value.bit_length() >> 3)
        else:
            self.charge(self._measure(value))
        return value

    def text(self, value: Any) -> Any:
        """`value`, paid for as the text that it is made into now."""
        self.charge(self._measure([value]))
        return value

    def listed(self, value: Any) -> Any:
        """A generator as a list, paid for while it grows; anything else as it is."""
        if not isinstance(value, GeneratorType | map | filter | Iterator):
            return value
        items = []
        for item in value:
            self.charge(_ITEM)
            items.append(item)
        return items

    def _measure(self, value: Any) -> int:
        """Bytes of the text that a value could become; what it holds twice counts twice."""
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            total += sys.getsizeof(item) if isinstance(item, Texts) else _ITEM
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, Mapping):
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView):
                waiting += item
            elif isinstance(item, range):
                total += _ITEM * len(item)
            elif isinstance(item, _Functions):  # its text is ours, and never the same twice
                raise TemplateError("it uses a function as a value")
            elif item is not value and _has_no_text(item):
                raise TemplateError(f"it uses a {type(item).__name__} as text")
            if total > self.left:
                raise TemplateError(f"it makes more than {self._all} bytes of text and lists")
        return total

    def repeated(self, left: Any, right: Any) -> None:
        """Pays for `left * right` beforehand."""
        for value, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(value, Texts | list | tuple):
                self.charge(max(count, 0) * self._measure(value))
                return
        self.bits(left, right)

    def bits(self, *numbers: Any) -> None:
        """Refuses whole numbers whose product would be absurd."""
        if all(isinstance(number, int) for number in numbers):
            if sum(number.bit_length() for number in numbers) > MAX_BITS:
                raise TemplateError("it makes a number that is too large")

    def power(self, base: Any, exponent: Any) -> None:
        """Refuses a power that would be absurd."""
        if isinstance(base, int) and isinstance(exponent, int):
            if base.bit_length() * abs(exponent) > MAX_BITS:
                raise TemplateError("it makes a number that is too large")

    def formatted(self, form: Any, values: Iterable[Any]) -> None:
        """Pays for a text in which `values` are put into `form`."""
        text = form.decode("latin-1") if isinstance(form, bytes) else form
        if isinstance(text, str):
            if _WIDE_FORMAT.search(text):
                raise TemplateError("it formats text to an absurd width")
            self.charge(len(text) * (MAX_INTEGER >> 8))
        self.charge(self._measure(list(values)))

    def modest(self, values: Iterable[Any]) -> None:
        """Refuses numbers that are widths or counts beyond reason."""
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise TemplateError(f"it asks for a width or count above {MAX_INTEGER}")

    def replaced(self, text: Any, old: Any, new: Any) -> None:
        """Pays for all places where `old` becomes `new`."""
        text, old, new = (
            value if isinstance(value, Texts) else str(value) for value in (text, old, new)
        )
        if type(text) is type(old):
            self.charge(text.count(old) * sys.getsizeof(new) + sys.getsizeof(text))

    def joined(self, items: Any, separator: Any) -> None:
        """Pays for items with a separator between them."""
        if isinstance(items, str | list | tuple):
            self.charge(len(items) * (sys.getsizeof(separator) + _ITEM) + self._measure(items))


def _has_no_text(value: Any) -> bool:
    """Whether all that there is to write of an object is where it lies in memory."""
    return bool(type(value).__repr__ is object.__repr__)


_current: ContextVar[Budget] = ContextVar("budget")


def budget() -> Budget:
    """That of the rendering which is under way."""
    return _current.get()


@contextmanager
def rendering(messages: Any) -> Iterator[None]:
    """Within it, everything is paid for out of one budget."""
    token = _current.set(Budget(messages))
    try:
        yield
    finally:
        _current.reset(token)
