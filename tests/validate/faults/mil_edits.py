"""Faults in a Core ML package; what its artifact claims of files and weights is made to fit."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from coremltools.proto.MIL_pb2 import Operation
from coremltools.proto.Model_pb2 import Model

from rgexport.export.coreml.package import PACKAGE
from rgexport.export.manifest_reader import read_manifest
from rgexport.griffin.config import GriffinConfig
from tests.export.mil.package_edits import block, edit, in_both, name_of
from tests.validate.conftest import claim

FLOAT16, FLOAT32 = 10, 11
"""Numbers of `DataType` in MIL.proto."""

Change = Callable[[Model], object]


def named(model: Model, function: str, name: str) -> Operation:
    """The operation of a name."""
    return next(o for o in block(model, function).operations if name_of(o) == name)


def with_operand(name: str, parameter: str, value: float) -> Change:
    """Gives an operation another number, in both functions; nobody else sees it."""

    def change(model: Model, function: str) -> None:
        operations = block(model, function).operations
        operation = named(model, function, name)
        argument = operation.inputs[parameter].arguments[0]
        place = [name_of(other) for other in operations].index(name)
        fresh = _constant(named(model, function, argument.name), f"{name}_fault", value)
        argument.name = f"{name}_fault"
        operations.insert(place, fresh)

    return in_both(change)


def _constant(like: Operation, name: str, value: float) -> Operation:
    constant = Operation()
    constant.CopyFrom(like)
    _rename(constant, name)
    tensor = constant.attributes["val"].immediateValue.tensor
    values = getattr(tensor, tensor.WhichOneof("value")).values
    values[:] = [type(values[0])(value)]
    return constant


def reads(name: str, parameter: str, value: str) -> Change:
    """Makes an operation read another value, in both functions."""

    def change(model: Model, function: str) -> None:
        named(model, function, name).inputs[parameter].arguments[0].name = value

    return in_both(change)


def in_half(value: str) -> Change:
    """Rounds a float32 value to float16: it is what its operation gave, there and back."""

    def change(model: Model, function: str) -> None:
        operations = block(model, function).operations
        place = [name_of(operation) for operation in operations].index(value)
        half = _cast(operations, place, f"{value}_exact", f"{value}_half", FLOAT16)
        back = _cast(operations, place, f"{value}_half", value, FLOAT32)
        _rename(operations[place], f"{value}_exact")
        operations.insert(place + 1, half)
        operations.insert(place + 2, back)

    return in_both(change)


def _rename(operation: Operation, name: str) -> None:
    operation.attributes["name"].immediateValue.tensor.strings.values[0] = name
    operation.outputs[0].name = name


def _cast(
    operations: Sequence[Operation], place: int, value: str, name: str, dtype: int
) -> Operation:
    """A cast of a value of the shape of operation `place`'s, made like one that stands before."""
    like = next(o for o in operations[:place] if o.type == "cast" and _dtype(o) == dtype)
    cast = Operation()
    cast.CopyFrom(like)
    cast.inputs["x"].arguments[0].name = value
    _rename(cast, name)
    cast.outputs[0].type.CopyFrom(operations[place].outputs[0].type)
    cast.outputs[0].type.tensorType.dataType = dtype
    return cast


def _dtype(operation: Operation) -> int:
    return int(operation.outputs[0].type.tensorType.dataType)


def spoil(artifact: Path, change: Change) -> None:
    """Edits the program of an artifact's package; its hashes are made to fit."""
    edit(change)(artifact / PACKAGE)
    claim(artifact)


def claim_config(artifact: Path, config: GriffinConfig) -> None:
    """Makes an artifact say that it was made for another configuration than it was."""
    claim(artifact, dataclasses.replace(read_manifest(artifact), config=config))
