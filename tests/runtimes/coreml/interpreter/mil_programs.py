"""Programs of the interpreter's own dataclasses, and what coremltools computes for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function as MilFunction
from coremltools.converters.mil.mil import Var, types

from rgexport.export.mil.blob import BlobFile
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import (
    BITS,
    FileValue,
    Function,
    Immediate,
    Name,
    Operation,
    TensorType,
    Value,
    numpy_type,
)
from rgexport.runtimes.coreml.interpreter.interpreter import Interpreter
from rgexport.runtimes.coreml.interpreter.weights import WeightCache

FILE = "@model_path/weights/weight.bin"
_DTYPES = {
    **{types.fp16: "float16", types.fp32: "float32", types.bool: "bool", types.str: "string"},
    **{types.int8: "int8", types.int16: "int16", types.int32: "int32"},
    **{types.uint8: "uint8", types.uint16: "uint16"},
}


def immediate(value: Any) -> Immediate:
    array = np.asarray(value)
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    if array.dtype.kind == "U":
        array = array.astype(object)
    dtype = "string" if array.dtype == object else array.dtype.name
    return Immediate(TensorType(dtype, array.shape), array)


def type_of(array: np.ndarray) -> TensorType:
    return TensorType(array.dtype.name, array.shape)


def operation(
    kind: str,
    inputs: Mapping[str, Value | Sequence[Value]],
    outputs: Mapping[str, TensorType],
    **constants: Any,
) -> Operation:
    """An operation named as its first output; constants are given by value."""
    given = {n: (v,) if isinstance(v, Value) else tuple(v) for n, v in inputs.items()}
    given |= {name: (immediate(value),) for name, value in constants.items()}
    return Operation(kind, next(iter(outputs), kind), given, tuple(outputs.items()))


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
    function: Function,
    weights: Path | None = None,
    cache: int = 1 << 30,
    also: Sequence[str] = (),
) -> Interpreter:
    whole = package(function, weights=weights)
    return Interpreter(whole, function.name, WeightCache(cache), also)


def compute(
    kind: str,
    arrays: Mapping[str, np.ndarray | list[np.ndarray]],
    outputs: Sequence[TensorType],
    **constants: Any,
) -> list[np.ndarray]:
    """One operation on arrays that come in as inputs of the function."""
    feeds: dict[str, np.ndarray] = {}
    inputs: dict[str, list[Value]] = {}
    for name, value in arrays.items():
        for array in value if isinstance(value, list) else [value]:
            feed = f"input_{len(feeds)}"
            feeds[feed] = array
            inputs.setdefault(name, []).append(Name(feed))
    names = {f"output_{i}": type for i, type in enumerate(outputs)}
    function = main(
        [operation(kind, inputs, names, **constants)],
        {name: type_of(array) for name, array in feeds.items()},
        list(names),
    )
    found = opened(function)(feeds, {})
    return [found[name] for name in names]


def inferred(kind: str, **arguments: Any) -> tuple[list[TensorType], list[np.ndarray | None]]:
    """Types and values that coremltools infers for an operation of constants."""
    with MilFunction({}, opset_version=ct.target.iOS18):
        result = getattr(mb, kind)(**arguments)
    results: list[Var] = list(result) if isinstance(result, list | tuple) else [result]
    return [_type(r) for r in results], [
        None if r.val is None else np.asarray(r.val) for r in results
    ]


def _type(var: Var) -> TensorType:
    if types.is_tensor(var.sym_type):
        shape = tuple(int(n) for n in var.sym_type.get_shape())
        return TensorType(_DTYPES[var.sym_type.get_primitive()], shape)
    return TensorType(_DTYPES[var.sym_type], ())


class Blobs:
    """A weight file, written by Apple's own library."""

    def __init__(self, folder: Path):
        from coremltools.libmilstoragepython import _BlobStorageWriter

        self.path = folder / "weight.bin"
        self._writer = _BlobStorageWriter(str(self.path))

    def add(self, array: np.ndarray, dtype: str | None = None) -> FileValue:
        """Stores an array; `dtype` for elements of fewer than 8 bits."""
        dtype = dtype or array.dtype.name
        flat = np.ascontiguousarray(array).reshape(-1)
        word = {"float32": "float", "float16": "fp16"}.get(dtype, dtype)
        write = getattr(self._writer, f"write_{word}_data")
        if dtype == "float16":
            offset = write(flat.view(np.uint16))
        else:
            bits = getattr(types, f"np_{dtype}_dtype", None)
            offset = write(flat.astype(bits) if bits is not None else flat)
        return FileValue(TensorType(dtype, array.shape), FILE, offset)

    def close(self) -> Path:
        """Has everything on the disk; the file's path."""
        del self._writer
        return self.path


def random_elements(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """All values of an integer dtype, or floats."""
    held = numpy_type(dtype)
    if held.kind == "f":
        return random.uniform(-1, 1, shape).astype(held)
    low = -(1 << BITS[dtype] - 1) if held.kind == "i" else 0
    return random.integers(low, low + (1 << BITS[dtype]), shape).astype(held)
