"""A sandbox for chat templates, which limits their output and their running time.

A template is a program that comes with a download. A few operations fill any memory (`'a' *
10**10`, or thirty nested lists that each hold the next one twice) or run for ever. So only filters
and methods are allowed whose result is about as large as their input. Each result is charged to a
budget, by the size of its text; operations that multiply sizes (`*`, replace, join, split, loops)
are charged before they run.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, MappingView, Sequence
from types import CodeType, GeneratorType
from typing import Any, NoReturn

from jinja2 import TemplateError, Undefined, nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE, MAX_TOKENS = 1 << 16, 1 << 14
"""Characters and lexical tokens of a template: four times those of the longest known one."""
BYTES = 16 << 20
"""Budget of a rendering; each byte of its messages adds `PER_BYTE`."""
PER_BYTE = 64
STEPS, PER_MESSAGE, BYTES_PER_STEP = 200_000, 200, 64
"""Operations of a rendering: about a second on a slow machine. Each message, and each
`BYTES_PER_STEP` of messages, adds to them."""
_SCANNED = 1024  # bytes of text that one operation may read; longer reading counts as several
SECONDS = 5.0
"""Processor time of a rendering, in case that steps are unexpectedly slow."""
MAX_BITS = 1 << 12
MAX_INDENT = 16
_STEP, _ITEM = 16, 64  # bytes charged for an operation, and for an item of a list

_GENERATORS = GeneratorType, map, filter
_FILTERS = """abs capitalize count d default dictsort e escape first float int items join last
length list lower map max min reject rejectattr replace reverse safe select selectattr sort string
title trim unique upper""".split()
_INSTANT = {"count", "d", "default", "first", "last", "length"}
_TEXT_METHODS = """capitalize casefold count endswith find index isalnum isalpha isdigit islower
isspace isupper join lower lstrip partition removeprefix removesuffix replace rfind rpartition
rsplit rstrip split splitlines startswith strip title upper""".split()


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, messages: Sequence[Mapping[str, str]], **functions: Any) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self.written
        )
        filters: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        filters["tojson"] = self._to_json
        self.filters = {name: self._charged(name, call) for name, call in filters.items()}
        del self.tests["in"]  # `select('in', ...)` would scan a list for each item of a list
        self.globals |= functions | {"cycler": _unstable, "lipsum": _unstable}
        self._budget = self._all = self._steps = sys.maxsize
        size = self._size(messages)
        self._budget = self._all = BYTES + PER_BYTE * size
        self._steps = STEPS + PER_MESSAGE * len(messages) + size // BYTES_PER_STEP
        self._all_steps = self._steps
        self._began, self._computed = time.monotonic(), time.thread_time()

    def template(self, source: str) -> Any:
        return self.template_class.from_code(self, _code(source), self.make_globals(None))

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Raises the current error; Jinja would first look up the line of each call."""
        raise

    def charge(self, size: int = 0, scanned: int = 0) -> None:
        """Takes a step, `size` bytes, and steps for `scanned` bytes of text from the budget."""
        self._budget -= _STEP + size
        self._steps -= 1 + scanned // _SCANNED
        if self._budget < 0:
            raise self._too_much()
        if self._steps < 0:
            raise TemplateError(f"it takes more than {self._all_steps} steps")
        # Processor time takes a system call, so the other clock is asked first.
        if (
            time.monotonic() - self._began > SECONDS
            and time.thread_time() - self._computed > SECONDS
        ):
            raise TemplateError(f"it runs longer than {SECONDS:g} s")

    def made(self, value: Any) -> Any:
        size = self._size(value)
        self.charge(size, size)
        return value

    def compared(self, value: Any) -> Any:
        """Charges the reading of a value: half a step for each item, and text by its length."""
        size = self._size(value)
        self.charge(scanned=size if isinstance(value, str) else size * _SCANNED // (2 * _ITEM))
        return value

    def written(self, value: Any) -> Any:
        if _has_no_text(value):
            raise TemplateError(f"it writes a {type(value).__name__}")
        return self.made(value)

    def concatenated(self, *values: Any) -> str:
        return "".join(str(self.written(value)) for value in values)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return not isinstance(obj, int | float) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charges an operation, `*` before it runs; refuses `**`, and `%` of text."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateError(f"it uses {operator}, which is not allowed here")
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and not isinstance(value, int | float):
                    self.charge(max(count, 0) * self._size(value))
        return self.made(self.binop_table[operator](left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if owner is self:  # one of the calls that `_Charging` has inserted
            return obj(*args)
        if isinstance(owner, str):
            args = _listed(args)
            values = [*args, *kwargs.values()]
            self.charge(scanned=len(owner))
            subject, rest = (values[0], [owner]) if obj.__name__ == "join" else (owner, values)
            self._charge_expansion(obj.__name__, subject, *rest)
        return self.made(super().call(context, obj, *args, **kwargs))

    def _charged(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(call, "jinja_pass_arg"))  # then the context comes before the input

        @functools.wraps(call)
        def charged(*args: Any, **kwargs: Any) -> Any:
            args = _listed(args)
            subject, *rest = args[first:]
            if _has_no_text(subject):
                raise TemplateError(f"it uses a {type(subject).__name__} as text")
            if name == "replace" and kwargs:
                raise TemplateError("it names an argument of replace")
            if name not in _INSTANT:
                self.compared(subject)
            self._charge_expansion(name, subject, *rest, *kwargs.values())
            return self.made(call(*args, **kwargs))

        return charged

    def _charge_expansion(self, name: str, subject: Any, *rest: Any) -> None:
        match name:
            case "replace" if len(rest) > 1:
                self.charge(str(subject).count(str(rest[0])) * self._size(str(rest[1])))
            case "join" if hasattr(subject, "__len__"):
                separator = max((self._size(str(value)) for value in rest), default=0)
                self.charge(len(subject) * separator)
            case "split" | "rsplit" if rest and isinstance(rest[0], str) and rest[0]:
                self.charge(_ITEM * subject.count(rest[0]))
            case "split" | "rsplit" | "splitlines" | "list" if isinstance(subject, str):
                self.charge(_ITEM * len(subject))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: None = None,
        sort_keys: bool = False,
    ) -> str:
        """Replaces Hugging Face's filter `tojson`, with a bounded indent and default separators."""
        if separators is not None or not (indent is None or 0 <= indent <= MAX_INDENT):
            raise TemplateError(f"tojson takes an indent of 0 to {MAX_INDENT}, and no separators")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
        chunks = []
        for chunk in encoder.iterencode(value):
            self.charge(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)

    def _size(self, value: Any) -> int:
        kind = type(value)
        if kind in (str, bool):  # nearly all are
            return sys.getsizeof(value)
        if kind is int and value.bit_length() <= MAX_BITS:
            return _ITEM
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            if type(item) is str:
                total += sys.getsizeof(item)
                continue
            total += sys.getsizeof(item) if isinstance(item, str) else _ITEM
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset | MappingView):
                waiting += item  # type: ignore[arg-type]
            elif isinstance(item, range):
                total += _ITEM * len(item)
            elif isinstance(item, int) and item.bit_length() > MAX_BITS:
                raise TemplateError("it makes a number that is too large")
            elif item is not value and _has_no_text(item):
                raise TemplateError(f"it uses a {type(item).__name__} as a value")
            if total > self._budget:
                raise self._too_much()
        return total

    def _too_much(self) -> TemplateError:
        return TemplateError(f"it makes more than {self._all} bytes of text and lists")


class _Charging(NodeTransformer):
    """Inserts calls of the sandbox's methods into a template's tree.

    Rounds of loops are charged with the constant text in them, and literals, which may hold one
    value many times; slices, which are copies; and both sides of comparisons.
    """

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        charge = _call("charge", [nodes.Const(text)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", [node], node.lineno)

    visit_Dict = visit_List

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        for side in (node, *node.ops):
            side.expr = _call("compared", [side.expr], node.lineno)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        is_slice = isinstance(node.arg, nodes.Slice)
        return self.visit_List(node) if is_slice else self.generic_visit(node)


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    """Returns a call of a method of the sandbox, which no name in a template can shadow."""
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _listed(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(list(v) if isinstance(v, _GENERATORS) else v for v in values)


def _unstable(*_: Any, **__: Any) -> NoReturn:
    raise TemplateError("it asks for text that is another one each time")


@functools.lru_cache(maxsize=16)
def _code(source: str) -> CodeType:
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"it has {len(source)} characters; expected at most {MAX_SOURCE}")
    sandbox = Sandbox([])
    for count, _ in enumerate(sandbox.lex(source)):
        if count >= MAX_TOKENS:
            raise TemplateError(f"it has more than {MAX_TOKENS} tokens")
    tree = _Charging().visit(sandbox.parse(source))
    tree.set_environment(sandbox)
    return sandbox.compile(tree)


def _has_no_text(value: Any) -> bool:
    """Returns whether the text of an object would contain its address in memory."""
    if type(value) is str or isinstance(value, Undefined):
        return False
    representation: Any = type(value).__repr__
    has_address = representation is object.__repr__
    return has_address or callable(value) or isinstance(value, _GENERATORS)
