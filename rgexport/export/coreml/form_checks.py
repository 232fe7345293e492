"""Whether a package looks from outside as its artifact's manifest says."""

from collections.abc import Iterator

from rgexport.export.coreml.states import DECODE, PREFILL, Form, io_record, stored_states
from rgexport.export.manifest import ValueRecord
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import Function, TensorType
from rgexport.griffin.config import GriffinConfig

Types = dict[str, TensorType]


def check_form(package: Package, config: GriffinConfig, form: Form) -> Iterator[str]:
    """Complaints about functions, inputs, outputs and states that a session could not use."""
    tokens = {DECODE: 1, PREFILL: form.prefill_length}
    for name in package.functions.keys() ^ tokens.keys():
        yield f"{name}: there {'is' if name in package.functions else 'is no'} such function"
    if package.default_function != DECODE:
        yield f"the default function is {package.default_function}; expected {DECODE}"
    states = {name: TensorType("float16", s) for name, s in stored_states(config, form).items()}
    io = io_record(config, form)
    for name, count in tokens.items():
        if function := package.functions.get(name):
            outputs = _outputs(function)
            yield from _compare(function, "input", function.inputs, _types(io.inputs, count))
            yield from _compare(function, "output", outputs, _types(io.outputs, count))
            yield from _compare(function, "state", function.states, states)


def _types(values: tuple[ValueRecord, ...], tokens: int) -> Types:
    return {
        value.name: TensorType(
            value.dtype, tuple(tokens if size == "tokens" else int(size) for size in value.shape)
        )
        for value in values
    }


def _outputs(function: Function) -> Types:
    given = {name: kind for op in function.operations for name, kind in op.outputs}
    return {name: given[name] for name in function.outputs if name in given}


def _compare(function: Function, kind: str, found: Types, expected: Types) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        here, there = found.get(name), expected.get(name)
        if here != there:
            yield (
                f"{function.name}: {kind} {name} is {here or 'missing'}; the manifest has "
                f"{there or 'none'}"
            )
