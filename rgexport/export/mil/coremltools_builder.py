"""One operation in coremltools' builder, by itself: the place that uses its parts to infer types.

Written against coremltools 9. The operation stands in a function whose inputs are its operands: so
nothing is computed, and a weight takes no memory. coremltools' loader of whole programs
(`frontend.milproto.load`) does neither: it reads every weight, and folds constants.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from rgexport.export.mil.operand import Misfit, Operand, Operands
from rgexport.export.mil.program import UNKNOWN, TensorType

_SHAPING = "shape", "begin", "end"
"""Inputs that may be computed, but whose content gives a shape where it is known."""


@dataclass(frozen=True)
class _Tools:
    """The parts of coremltools that are used."""

    builder: Any
    function: Any
    placeholder: Any
    state_placeholder: Any
    types: Any
    registry: Any
    target: Any


@cache
def _tools() -> _Tools:
    """Loads coremltools, which takes seconds."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of versions of torch
    from coremltools import target
    from coremltools.converters.mil.mil import Builder, Function, types
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
    from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder

    placeholders = Placeholder, StateTensorPlaceholder
    return _Tools(Builder, Function, *placeholders, types, SSAOpRegistry, target.iOS18)


def exists(kind: str) -> bool:
    """Whether there is an operation of that type."""
    return bool(_tools().registry.core_ops.get(kind))


def slots(kind: str) -> Mapping[str, Any]:
    """Input of an operation → what it takes: `optional`, and `const` if it must be a constant."""
    tools = _tools()
    found: Mapping[str, Any] = tools.registry.core_ops[kind][tools.target].input_spec.input_types
    return found


def build(kind: str, operands: Operands) -> list[TensorType]:
    """The types that coremltools infers.

    Raises:
        Misfit: operands that cannot be put before it.
        Exception: of any kind, from coremltools, which does not take them.
    """
    tools, taken, variables = _tools(), slots(kind), _Variables()
    bound = {
        name: [variables.add(operand, name, taken[name].const) for operand in given]
        for name, given in operands.items()
    }
    with (
        warnings.catch_warnings(action="ignore"),  # of numpy, about a slice without a step
        tools.function(variables.inputs, opset_version=tools.target) as function,
    ):
        arguments: dict[str, Any] = {}
        for name, values in bound.items():
            made = [function.inputs[v] if isinstance(v, str) else v.value for v in values]
            many = type(taken[name]).__name__ == "TupleInputType"
            arguments[name] = made if many else _single(name, made)
        found = getattr(tools.builder, kind)(name="it", **arguments)
    results = found if isinstance(found, list | tuple) else [found]
    return [_type_of(var.sym_type) for var in results]


@dataclass(frozen=True)
class _Constant:
    value: Any


class _Variables:
    """Operands as coremltools has them: inputs of a function, and constants."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {"unused": _placeholder(TensorType("int32", (1,)))}

    def add(self, operand: Operand, name: str, fixed: bool) -> str | _Constant:
        """The name of a new input, or a constant where one is due and there."""
        if operand.constant and (fixed or name in _SHAPING and operand.known is not None):
            return _Constant(_content(operand, name))
        made = f"input_{len(self.inputs)}"
        self.inputs[made] = _placeholder(operand.type, operand.state)
        return made


def _placeholder(kind: TensorType, state: bool = False) -> Any:
    tools = _tools()
    if state:
        return tools.state_placeholder(kind.shape, _builtin(kind))
    return tools.placeholder(kind.shape, _builtin(kind), allow_rank0_input=True)


def _content(operand: Operand, name: str) -> Any:
    """A constant; zeros that take the memory of one where only its type matters."""
    kind = operand.type
    dtype = _tools().types.nptype_from_builtin(_builtin(kind))
    if operand.known is not None:
        if kind.dtype == "string":
            return operand.known[0] if not kind.shape else list(operand.known)
        array = np.array(operand.known, dtype).reshape(kind.shape)
        return array if kind.shape else array[()]
    if kind.dtype in ("int32", "bool", "string"):
        raise Misfit(f"its input {name} is {kind}; expected a small value in the program itself")
    zero = np.zeros(1, dtype)
    return np.lib.stride_tricks.as_strided(zero, kind.shape, (0,) * len(kind.shape))


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise Misfit(f"its input {name} has {len(values)} values; expected one")
    return values[0]


def _builtin(kind: TensorType) -> Any:
    """What coremltools has for a dtype."""
    return _tools().types.string_to_builtin(kind.dtype.replace("float", "fp"))


def _type_of(kind: Any) -> TensorType:
    types = _tools().types
    tensor = types.is_tensor(kind)
    word = types.builtin_to_string(kind.get_primitive() if tensor else kind)
    shape = kind.get_shape() if tensor else ()
    sizes = tuple(int(n) if isinstance(n, int | np.integer) else UNKNOWN for n in shape)
    return TensorType(word.replace("fp", "float"), sizes)
