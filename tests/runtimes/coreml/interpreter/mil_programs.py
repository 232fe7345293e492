"""Programs of the interpreter's own dataclasses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.coreml.mil.package import BlobFile, Package
from rgexport.artifacts.coreml.mil.program import Function, Immediate, Operation, TensorType, Value
from rgexport.runtimes.coreml.interpreter.interpreter import Interpreter
from rgexport.runtimes.coreml.interpreter.weights import WeightCache

FILE = "@model_path/weights/weight.bin"


def immediate(value: Any) -> Immediate:
    array = np.asarray(value)
    array = array.astype({"i8": np.int32}.get(array.dtype.str[1:], array.dtype))
    if array.dtype.kind == "U":
        return Immediate(TensorType("string", array.shape), array.astype(object))
    return Immediate(TensorType(array.dtype.name, array.shape), array)


def operation(
    kind: str,
    inputs: Mapping[str, Value | Sequence[Value]],
    outputs: Mapping[str, TensorType],
    **constants: Any,
) -> Operation:
    """An operation named as its first output; constants are given by value."""
    values = {n: (v,) if isinstance(v, Value) else tuple(v) for n, v in inputs.items()}
    values |= {name: (immediate(value),) for name, value in constants.items()}
    return Operation(kind, next(iter(outputs), kind), values, tuple(outputs.items()))


def package(*functions: Function, weights: Path | None = None) -> Package:
    """A package that never was a folder, with at most one weight file."""
    return Package(
        path=Path("made.mlpackage"),
        model=Path("made.mlmodel"),
        specification_version=9,
        functions={f.name: f for f in functions},
        default_function=functions[0].name,
        description=None,
        blob_files={FILE: BlobFile.open(weights)} if weights else {},
    )


def main(
    operations: Sequence[Operation],
    inputs: Mapping[str, TensorType],
    outputs: Sequence[str],
    states: Mapping[str, TensorType] | None = None,
) -> Function:
    return Function("main", dict(inputs), dict(states or {}), tuple(outputs), tuple(operations))


def opened(
    function: Function, weights: Path | None = None, cache: int = 1 << 30, also: Sequence[str] = ()
) -> Interpreter:
    return Interpreter(package(function, weights=weights), "main", WeightCache(cache), also)
