"""Whether the operations of a function fit together: names, kinds, operands and types."""

from collections.abc import Iterator
from typing import Any

from rgexport.export.mil.inference import MOST_KNOWN, exists, result_types
from rgexport.export.mil.operand import Misfit, Operand
from rgexport.export.mil.program import (
    UNKNOWN,
    Constant,
    FileValue,
    Function,
    Immediate,
    Name,
    Operation,
    TensorType,
    Value,
)

CONST = "const"
CONSTANT_EXPRESSION = "constexpr_"

Values = dict[str, Operand]
"""What is known of the values of a function, by name."""


def check_operations(function: Function) -> Iterator[str]:
    """What is wrong with the operations of a function, each named.

    A value whose type was declared wrongly counts as what it is from then on, so that one mistake
    is one complaint.
    """
    values = {
        **{name: Operand(kind) for name, kind in function.inputs.items()},
        **{name: Operand(kind, state=True) for name, kind in function.states.items()},
    }
    for operation in function.operations:
        where = f"{function.name}: {operation.type} {operation.label}"
        for complaint in _check(operation, values):
            yield f"{where}: {complaint}"
    for name in function.outputs:
        if name not in values:
            yield f"{function.name}: its output {name} is given by no operation"


def _check(operation: Operation, values: Values) -> Iterator[str]:
    """Adds what the operation gives to the `values`."""
    missing = [name for name in _names(operation) if name not in values]
    if missing:
        yield f"it takes {', '.join(missing)}, which nothing before it gives"
    yield from _unknown_kind(operation)
    types = None
    if not missing:
        try:
            types = _result_types(operation, values)
        except Misfit as misfit:
            yield str(misfit)
    if types is not None and len(types) != len(operation.outputs):
        yield f"it gives {len(operation.outputs)} values; expected {len(types)}"
        types = None
    for index, (name, declared) in enumerate(operation.outputs):
        if name in values:
            yield f"it gives {name}, which was given before"
        computed = declared if types is None else types[index]
        if not _agree(declared, computed):
            yield f"it declares {name} as {declared}; computed {computed}"
        values[name] = _result(operation, computed)


def _names(operation: Operation) -> Iterator[str]:
    for bound in operation.inputs.values():
        yield from (value.name for value in bound if isinstance(value, Name))


def _unknown_kind(operation: Operation) -> Iterator[str]:
    for inner in (operation, *(op for block in operation.blocks for op in block)):
        if not exists(inner.type):
            yield f"Core ML has no operation {inner.type!r}"


def _result_types(operation: Operation, values: Values) -> list[TensorType] | None:
    if operation.type == CONST:
        value = operation.attributes.get("val")
        if value is None:
            raise Misfit("it has no value")
        return [value.type]
    if operation.attributes and operation.type.startswith(CONSTANT_EXPRESSION):
        return None  # as they were before iOS 18
    return result_types(
        operation.type,
        {
            name: tuple(_operand(value, values) for value in bound)
            for name, bound in operation.inputs.items()
        },
    )


def _operand(value: Value, values: Values) -> Operand:
    match value:
        case Name(name):
            return values[name]
        case Immediate(kind):
            return Operand(kind, constant=True, known=_known(value))
        case FileValue(kind):
            return Operand(kind, constant=True)


def _result(operation: Operation, kind: TensorType) -> Operand:
    if operation.type == CONST:
        known = _known(operation.attributes.get("val"))
        return Operand(kind, constant=True, known=known)
    return Operand(kind, constant=operation.type.startswith(CONSTANT_EXPRESSION))


def _known(value: Constant | None) -> tuple[Any, ...] | None:
    """The elements of a small constant that stands in the program."""
    if not isinstance(value, Immediate) or value.array.size > MOST_KNOWN:
        return None
    return tuple(value.array.reshape(-1).tolist())


def _agree(declared: TensorType, computed: TensorType) -> bool:
    """Whether they are one type; a size that only running gives agrees with any."""
    if declared.dtype != computed.dtype or len(declared.shape) != len(computed.shape):
        return False
    sizes = zip(declared.shape, computed.shape, strict=True)
    return all(a == b or UNKNOWN in (a, b) for a, b in sizes)
