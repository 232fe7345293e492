"""Operations made with coremltools' own builder, and what it infers of them."""

from collections.abc import Callable
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Var, types
from coremltools.converters.mil.mil.operation import Operation
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder

from rgexport.export.mil.program import TensorType
from rgexport.export.mil.signatures import Operand

DTYPES = {
    **{"float16": types.fp16, "float32": types.fp32, "bool": types.bool, "string": types.str},
    **{"int8": types.int8, "int16": types.int16, "int32": types.int32},
    **{"uint8": types.uint8, "uint16": types.uint16, "int4": types.int4, "uint4": types.uint4},
    **{"uint1": types.uint1, "uint2": types.uint2, "uint3": types.uint3, "uint6": types.uint6},
}
NAMES = {kind: name for name, kind in DTYPES.items()}

Input = tuple[str, tuple[int, ...]]
"""dtype and shape of a value that is computed at run time."""


def build(kind: str, arguments: dict[str, Any], state: Input | None = None) -> Operation:
    """The operation `kind` in a function whose inputs are the `Input`s among its arguments."""
    inputs: dict[str, Any] = {}

    def placed(value: Any) -> Callable[[], Any]:
        if isinstance(value, list) and value and all(map(is_input, value)):
            parts = [placed(item) for item in value]
            return lambda: [part() for part in parts]
        if not is_input(value):
            return lambda: value
        name = f"input_{len(inputs)}"
        inputs[name] = Placeholder(value[1], dtype=DTYPES[value[0]], name=name)
        return lambda: function.inputs[name]

    late = {name: placed(value) for name, value in arguments.items()}
    if state:
        inputs["state"] = StateTensorPlaceholder(state[1], dtype=DTYPES[state[0]], name="state")
    if not inputs:
        inputs["unused"] = Placeholder((1,), dtype=types.fp32, name="unused")
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        given = {name: value() for name, value in late.items()}
        if state:
            given["input"] = function.inputs["state"]
        results = getattr(mb, kind)(**given)
    first: Var = results[0] if isinstance(results, list | tuple) else results
    return first.op


def is_input(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] in DTYPES


def operands(operation: Operation) -> dict[str, tuple[Operand, ...]]:
    """The inputs of an operation as our rules have them."""
    return {
        name: tuple(map(operand, var if isinstance(var, list | tuple) else [var]))
        for name, var in operation.inputs.items()
    }


def operand(var: Var) -> Operand:
    if types.is_state(var.sym_type):
        return Operand(tensor_type(var.sym_type.wrapped_type()), state=True)
    known = var.val is not None and var.op is not None
    array = np.array(var.val) if known else None
    return Operand(tensor_type(var.sym_type), known or var.is_descendant_of_const, array)


def tensor_type(kind: Any) -> TensorType:
    if types.is_tensor(kind):
        return TensorType(NAMES[kind.get_primitive()], tuple(int(n) for n in kind.get_shape()))
    return TensorType(NAMES[kind], ())


def definition(kind: str) -> type[Operation]:
    """Coremltools' newest definition of an operation up to iOS 18."""
    versions = SSAOpRegistry.core_ops[kind]
    known = [target for target in versions if target.value <= ct.target.iOS18.value]
    return versions[max(known, key=lambda target: target.value)]
