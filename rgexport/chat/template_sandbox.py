"""Jinja's sandbox for chat templates, in which every operation is paid for (`template_budget`)."""

import functools
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from rgexport.chat.template_budget import Budget, Texts, budget

MAX_SOURCE = 1 << 18
"""Characters of a template: ten times the longest that is known."""

_DROPPED_FILTERS = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint", "random")
"""Slow on long texts, or never the same twice; no template of messages needs them."""
_DROPPED_METHODS = {"translate", "maketrans", "striptags"}


def _tick(data: int) -> bool:
    """One round of a loop or one call of a macro; `data` is text of its body."""
    budget().charge(data)
    return True


def _concatenated(*parts: Any) -> str:
    return "".join(map(str, map(budget().text, parts)))


def _built(value: Any) -> Any:
    return budget().made(value)


def _compared(value: Any) -> Any:
    budget().charge()
    return value


def _no_filler(*_: Any, **__: Any) -> str:
    raise TemplateError("it asks for filler text, which is another one each time")


_OWN = {_tick, _concatenated, _built, _compared}


class Sandbox(ImmutableSandboxedEnvironment):
    """What chat templates run in; options and extensions are those that Hugging Face has."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_built
        )
        self.tick, self.concatenated, self.built = _tick, _concatenated, _built
        self.compared = _compared
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.globals["lipsum"] = _no_filler
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _paid_test(test) for name, test in tests.items()}

    def bound(self) -> None:
        """Puts a price on all filters, those included that were added."""
        self.filters = {name: _paid_filter(name, call) for name, call in self.filters.items()}

    def template(self, source: str) -> Any:
        """Compiles a template; where it loops, joins and compares, it pays.

        Raises:
            TemplateError: it is none, or far too long.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it has {len(source)} characters; expected at most {MAX_SOURCE}")
        tree = _Pricing().visit(self.parse(source))
        tree.set_environment(self)
        code = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Not what makes much out of little in one step."""
        return attr not in _DROPPED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measures the result, before it is made where it may be large."""
        check = _BINARY.get(operator)
        if check is not None:
            check(budget(), left, right)
        return budget().made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for functions and methods."""
        if obj in _OWN if isinstance(obj, _FUNCTION) else False:
            return obj(*args)
        method = getattr(obj, "__wrapped__", obj)  # `str.format` comes wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(owner, _BUILT_IN):
            values = [*args, *kwargs.values()]
            budget().modest(values)
            check = _METHODS.get(method.__name__)
            if check is not None:
                check(budget(), owner, values)
        return budget().made(super().call(context, obj, *args, **kwargs))


_FUNCTION = type(_tick)
_BUILT_IN = (str, bytes, int, float, list, tuple, dict)

_BINARY: dict[str, Callable[[Budget, Any, Any], None]] = {
    "*": Budget.repeated,
    "**": Budget.power,
    "%": lambda b, left, right: b.formatted(left, [right]) if isinstance(left, Texts) else None,
}


def _split(b: Budget, owner: Any, values: list[Any]) -> None:
    pieces = owner.count(values[0]) if values and type(values[0]) is type(owner) else len(owner)
    b.charge(64 * pieces + len(owner))


_METHODS: dict[str, Callable[[Budget, Any, list[Any]], None]] = {
    "replace": lambda b, owner, values: b.replaced(owner, *values[:2]),
    "join": lambda b, owner, values: b.joined(b.listed(values[0]) if values else (), owner),
    "format": lambda b, owner, values: b.formatted(owner, values),
    "format_map": lambda b, owner, values: b.formatted(owner, values),
    "expandtabs": lambda b, owner, values: b.charge(owner.count("\t") * max([8, *values])),
    **dict.fromkeys(("split", "rsplit", "splitlines"), _split),
}
"""What is checked before a method is called with these values."""


def _paid_test(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def paid(*args: Any, **kwargs: Any) -> Any:
        budget().charge()
        return test(*args, **kwargs)

    return paid


def _sum(b: Budget, values: list[Any]) -> None:
    if not all(isinstance(value, int | float | str | None) for value in values[1:]):
        raise TemplateError("it adds up what are no numbers")


_FILTERS: dict[str, Callable[[Budget, list[Any]], None]] = {
    "replace": lambda b, values: b.replaced(*values[:3]) if len(values) > 2 else None,
    "join": lambda b, values: b.joined(values[0], values[1] if len(values) > 1 else ""),
    "format": lambda b, values: b.formatted(values[0], values[1:]),
    "indent": lambda b, values: b.charge(_lines(values[0]) * _width(values[1:])),
    "tojson": lambda b, values: b.charge(_lines(values[0]) * _width(values[1:])),
    "sum": _sum,
}
"""What is checked before a filter is called: its input comes first."""


def _lines(value: Any) -> int:
    return value.count("\n") + 1 if isinstance(value, str) else 64


def _width(values: list[Any]) -> int:
    sizes = [value if type(value) is int else len(value) for value in values if _has_size(value)]
    return max([4, *sizes])


def _has_size(value: Any) -> bool:
    return type(value) in (int, str)


def _paid_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Filters that get the context or the environment have it as their first argument."""
    first = int(hasattr(call, "jinja_pass_arg"))

    @functools.wraps(call)
    def paid(*args: Any, **kwargs: Any) -> Any:
        given, values = list(args[:first]), [budget().listed(value) for value in args[first:]]
        everything = [*values, *kwargs.values()]
        budget().modest(everything[1:])
        budget().text(values[0])
        check = _FILTERS.get(name)
        if check is not None:
            check(budget(), everything)
        return budget().made(call(*given, *values, **kwargs))

    return paid


class _Pricing(NodeTransformer):
    """Puts calls that pay into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Each round pays, also for the text in it."""
        return self._with_tick(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b`."""
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        """A literal may hold one value many times."""
        self.generic_visit(node)
        return _call("built", [node], node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """The same, where it is no target of an assignment."""
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Long texts take long to compare."""
        self.generic_visit(node)
        return _call("compared", [node], node.lineno)

    def _with_tick(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        data = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        tick = _call("tick", [nodes.Const(data)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    """A call of one of the environment's own functions, whatever names a template has taken."""
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)
