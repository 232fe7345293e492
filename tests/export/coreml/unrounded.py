"""A package whose activations and states keep all digits of float32, for exact comparisons.

Its weights are what they are: one that is dequantized to float16 is rounded to it.
"""

from dataclasses import replace

import numpy as np

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import (
    Constant,
    FileValue,
    Function,
    Immediate,
    Name,
    Operation,
    TensorType,
    Value,
)
from rgexport.runtimes.coreml.interpreter.weights import whole_constant

_WORDS = {"fp16": "fp32"}
"""What `cast` calls the dtypes."""


def unrounded(package: Package) -> Package:
    functions = {n: _function(package, f) for n, f in package.functions.items()}
    return replace(package, functions=functions)


def _function(package: Package, function: Function) -> Function:
    return replace(
        function,
        inputs={name: _wide(kind) for name, kind in function.inputs.items()},
        states={name: _wide(kind) for name, kind in function.states.items()},
        operations=tuple(
            o if _gives_weight(o, function) else _operation(package, o) for o in function.operations
        ),
    )


def _gives_weight(operation: Operation, function: Function) -> bool:
    """Whether it dequantizes a weight, or takes rows of one that is."""
    table = operation.inputs.get("x", ()) if operation.type == "gather" else ()
    given = {name for o in function.operations if _dequantizes(o) for name, _ in o.outputs}
    return _dequantizes(operation) or any(v.name in given for v in table if isinstance(v, Name))


def _dequantizes(operation: Operation) -> bool:
    return operation.type.startswith("constexpr_")


def _operation(package: Package, operation: Operation) -> Operation:
    return replace(
        operation,
        inputs={n: tuple(_value(package, v) for v in vs) for n, vs in operation.inputs.items()},
        outputs=tuple((name, _wide(kind)) for name, kind in operation.outputs),
        attributes={n: _constant(package, v) for n, v in operation.attributes.items()},
    )


def _value(package: Package, value: Value) -> Value:
    return value if isinstance(value, Name) else _constant(package, value)


def _constant(package: Package, value: Constant) -> Constant:
    kind = value.type
    if isinstance(value, Immediate) and kind.dtype == "string":
        words = np.array([_WORDS.get(word, word) for word in value.array.reshape(-1)], object)
        return Immediate(kind, words.reshape(kind.shape))
    if kind.dtype != "float16":
        return value
    assert isinstance(value, FileValue | Immediate)
    return Immediate(_wide(kind), whole_constant(package, value).astype(np.float32))


def _wide(kind: TensorType) -> TensorType:
    return replace(kind, dtype="float32") if kind.dtype == "float16" else kind
