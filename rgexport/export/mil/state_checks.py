"""Whether a function keeps its states: their types, and that each is read and written."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from rgexport.export.mil.program import Function, Name, Operation, TensorType

READ, WRITE = "read_state", "write_state"
STATE_DTYPE = "float16"
"""Core ML takes no other."""
TOKENS = "input_ids"
"""The input whose last axis says how many tokens a function takes."""


def check_states(function: Function, alignment: int | None) -> Iterator[str]:
    """What is wrong with a function's states.

    `alignment`: what the last axis must be a multiple of, for the Neural Engine; None for any.
    """
    for name, kind in function.states.items():
        where = f"{function.name}: state {name}"
        if kind.dtype != STATE_DTYPE:
            yield f"{where} is {kind.dtype}; Core ML takes {STATE_DTYPE} states alone"
        if alignment and (not kind.shape or kind.shape[-1] % alignment):
            yield f"{where} is {kind}; expected a last axis that is a multiple of {alignment}"
    writes = Counter(_state_of(operation) for operation in function.walk() if _writes(operation))
    for name in function.states:
        if not writes[name]:
            yield (
                f"{function.name}: state {name} is never written: {writes.total()} write_state "
                f"for {len(function.states)} states"
            )


def check_recurrences(function: Function) -> Iterator[str]:
    """What is wrong in a model of sequences, where every state follows from what it was before.

    One that is written twice, or with what does not come from it, was mixed up with another. Only
    a chunk of as many tokens as a state [1, 1, slots, width] has slots leaves nothing of it.
    """
    ids = function.inputs.get(TOKENS)
    chunk = ids.shape[-1] if ids and ids.shape else 1
    bits = {name: 1 << index for index, name in enumerate(function.states)}
    origins: dict[str, int] = {}
    written: set[str] = set()
    for operation in function.walk():
        origin = 0
        for value in chain.from_iterable(operation.inputs.values()):
            if isinstance(value, Name):
                origin |= origins.get(value.name, 0)
        state = _state_of(operation)
        where = f"{function.name}: {operation.type} {operation.label}"
        if operation.type == READ:
            origin |= bits.get(state, 0)
        elif _writes(operation) and state in bits:
            if state in written:
                yield f"{where}: it writes the state {state} a second time"
            elif not origin & bits[state] and _slots(function.states[state]) > chunk:
                yield f"{where}: it writes the state {state} with what does not come from it"
            written.add(state)
        origins.update((name, origin) for name, _ in operation.outputs)


def _slots(kind: TensorType) -> int:
    return kind.shape[-2] if len(kind.shape) > 1 else 1


def _writes(operation: Operation) -> bool:
    return operation.type == WRITE


def _state_of(operation: Operation) -> str:
    """The state that an operation reads or writes."""
    bound = operation.inputs.get("input", ())
    return bound[0].name if len(bound) == 1 and isinstance(bound[0], Name) else ""
