"""Whether the description of a model, which apps see, tells the truth about its program."""

from collections.abc import Iterable, Iterator, Mapping

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import UNKNOWN, Feature, Function, Interface, TensorType

Types = Mapping[str, TensorType | None]
"""Name → type; None where it is not known."""


def check_interfaces(package: Package) -> Iterator[str]:
    """Names and types of inputs, outputs and states: described as the functions have them."""
    described = package.description.interfaces
    for name in package.functions.keys() - described.keys():
        yield f"{name}: the description has no such function"
    for name in described.keys() - package.functions.keys():
        yield f"{name}: the description has this function, the program has not"
    for name, function in package.functions.items():
        if name in described:
            yield from _check_function(function, described[name])
    yield from _check_common_states(package)


def _check_function(function: Function, described: Interface) -> Iterator[str]:
    given = {name: kind for op in function.operations for name, kind in op.outputs}
    given |= function.inputs
    kinds: tuple[tuple[str, Types, Iterable[Feature]], ...] = (
        ("input", function.inputs, described.inputs),
        ("output", {name: given.get(name) for name in function.outputs}, described.outputs),
        ("state", function.states, described.states),
    )
    for kind, program, features in kinds:
        seen: set[str] = set()
        for feature in features:
            where = f"{function.name}: {kind} {feature.name}"
            if feature.name in seen:
                yield f"{where} is described twice"
            elif feature.name not in program:
                yield f"{where} is described, but the program has none"
            elif not _agree(feature.type, program[feature.name]):
                yield f"{where} is described as {feature.type}; it is {program[feature.name]}"
            seen.add(feature.name)
        for name in program.keys() - seen:
            yield f"{function.name}: {kind} {name} is not described"


def _agree(described: TensorType | None, found: TensorType | None) -> bool:
    """A description may leave open what is no array, and the shape of an output."""
    if described is None or found is None:
        return True
    if described.dtype != found.dtype:
        return False
    if not described.shape or not found.shape:
        return True
    if len(described.shape) != len(found.shape):
        return False
    sizes = zip(described.shape, found.shape, strict=True)
    return all(size in (other, UNKNOWN) or other == UNKNOWN for other, size in sizes)


def _check_common_states(package: Package) -> Iterator[str]:
    """Functions share their states only if each declares the same ones."""
    first = package.functions[package.default_function]
    for function in package.functions.values():
        for name in sorted(first.states.keys() | function.states.keys()):
            here, there = function.states.get(name), first.states.get(name)
            if here != there:
                yield (
                    f"{function.name}: state {name} is {here or 'missing'}; in {first.name} it is "
                    f"{there or 'missing'}"
                )
