"""What holds of every package that rgexport makes, so that its bare program tells of damage.

A weight is an operation that is named after its tensor, and what uses it is named after the
tensor's site; all functions share one copy; each state follows from itself.
"""

from collections.abc import Iterator, Mapping
from math import prod

from rgexport.export.mil.inference import OPERATIONS
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import FileValue, Function, Name, Operation, Value
from rgexport.export.mil.state_checks import check_recurrences
from rgexport.export.mil.typing_checks import CONST

SHARED = "embed_tokens.weight"
"""The one weight with two sites: it is the head too."""

Operations = Mapping[str, Operation]
Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name of a tensor → its shape."""


def check_conventions(package: Package, shapes: Shapes) -> Iterator[str]:
    """Complaints about a package of ours that holds the tensors of these names and shapes."""
    for function in package.functions.values():
        yield from _foreign_operations(function)
        yield from check_recurrences(function)
        yield from _missing(function, shapes)
        yield from _misused(function, shapes)


def check_shared(package: Package, shapes: Shapes) -> Iterator[str]:
    """Weights for which one function has other blobs than another."""
    first = package.functions[package.default_function]
    theirs = operations_by_name(first)
    for function in package.functions.values():
        ours = operations_by_name(function)
        for name in map(operation_name, shapes):
            here, there = _blobs(name, ours), _blobs(name, theirs)
            if here != there:
                yield (
                    f"{function.name}: {name} has its blobs at {here}; in {first.name} they are "
                    f"at {there}"
                )


def operation_name(tensor: str) -> str:
    """What the operation that gives a weight is called."""
    return tensor.replace(".", "_")


def operations_by_name(function: Function) -> dict[str, Operation]:
    """All operations of a function."""
    return {operation.name: operation for operation in function.walk()}


def constant(value: Value | None, operations: Operations) -> Value | None:
    """A value, or that of the `const` that it names."""
    if not isinstance(value, Name):
        return value
    operation = operations.get(value.name)
    return operation.attributes.get("val") if operation and operation.type == CONST else value


def bound_constants(operation: Operation, operations: Operations) -> dict[str, Value | None]:
    """Input of an operation that gives a weight → its value."""
    bound: dict[str, Value] = dict(operation.attributes)
    bound |= {name: values[0] for name, values in operation.inputs.items() if values}
    return {name: constant(value, operations) for name, value in bound.items()}


def _blobs(name: str, operations: Operations) -> list[int]:
    operation = operations.get(name)
    values = bound_constants(operation, operations).values() if operation else ()
    return sorted(value.offset for value in values if isinstance(value, FileValue))


def _foreign_operations(function: Function) -> Iterator[str]:
    for operation in function.walk():
        if operation.type not in OPERATIONS and operation.type != CONST:
            where = f"{function.name}: {operation.type} {operation.label}"
            yield f"{where}: rgexport makes no such operation"


def _missing(function: Function, shapes: Shapes) -> Iterator[str]:
    operations = operations_by_name(function)
    for tensor, shape in shapes.items():
        operation = operations.get(operation_name(tensor))
        if operation is None:
            yield f"{function.name}: there is no operation for the tensor {tensor}"
            continue
        where, found = f"{function.name}: {operation.type} {operation.label}", operation.outputs
        if len(found) != 1 or found[0][1].size != prod(shape):
            given = found[0][1] if found else "nothing"
            yield f"{where}: it gives {given}; expected as many items as {list(shape)}"


def _misused(function: Function, shapes: Shapes) -> Iterator[str]:
    """Weights that are used at another site than their own, or nowhere."""
    sites = {operation_name(tensor): tensor.rpartition(".")[0] for tensor in shapes}
    unused = dict.fromkeys(sites)
    for operation in function.walk():
        for value in (value for bound in operation.inputs.values() for value in bound):
            if not isinstance(value, Name) or value.name not in sites:
                continue
            unused.pop(value.name, None)
            own = operation.name.startswith(operation_name(sites[value.name]))
            if not own and value.name != operation_name(SHARED):
                where = f"{function.name}: {operation.type} {operation.label}"
                yield f"{where}: it takes {value.name}, which belongs to {sites[value.name]}"
    for name in unused:
        yield f"{function.name}: nothing uses {name}"
