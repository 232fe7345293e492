"""Which types an operation gives, by coremltools' own inference, and where it takes what it can't.

Only operations that rgexport makes are looked at. None of them makes a large value of small
constants, which coremltools would compute (as it does of `fill`): nobody's package fills the
memory.
"""

from functools import lru_cache

from rgexport.errors import one_line
from rgexport.export.mil import coremltools_builder
from rgexport.export.mil.inference_gaps import gap
from rgexport.export.mil.operand import Misfit, Operand, Operands
from rgexport.export.mil.program import UNKNOWN, TensorType

OPERATIONS = frozenset(
    (
        "add cast concat constexpr_blockwise_shift_scale constexpr_lut_to_dense cos equal exp "
        "gather gelu greater_equal less_equal linear logical_and matmul mul read_state "
        "reduce_mean reduce_sum reshape rsqrt sigmoid sin slice_by_index softmax sqrt sub tanh "
        "transpose write_state"
    ).split()
)
"""What rgexport makes, beside `const`; what others give is believed."""
MOST_KNOWN = 64
"""Elements of a constant whose content may matter to a type: an axis, a shape, a word."""
_MOST_ROWS = 1 << 24
"""Of a linear's weight, for each of which coremltools makes a number, as if there were no bias."""
_WRITE = "write_state"

_Inputs = tuple[tuple[str, tuple[Operand, ...]], ...]


def exists(kind: str) -> bool:
    """Whether Core ML has an operation."""
    return kind == _WRITE or coremltools_builder.exists(kind)


def result_types(kind: str, operands: Operands) -> list[TensorType] | None:
    """Types of what an operation of type `kind` gives.

    Returns:
        None where they are not inferred: sizes that only running gives, or not in `OPERATIONS`.

    Raises:
        Misfit: it does not take such operands.
    """
    given = [operand for bound in operands.values() for operand in bound]
    if kind not in OPERATIONS or any(UNKNOWN in operand.type.shape for operand in given):
        return None
    return _inferred(kind, tuple(sorted(operands.items())))


@lru_cache(4096)
def _inferred(kind: str, inputs: _Inputs) -> list[TensorType]:
    """Layers are alike, so most operations were seen before."""
    operands = dict(inputs)
    if kind == _WRITE:
        return _written(operands)
    _check_names(kind, operands)
    if kind == "linear" and operands["weight"][0].type.shape[:1] > (_MOST_ROWS,):
        raise Misfit(f"its weight is {operands['weight'][0].type}, which is too large")
    try:
        results = coremltools_builder.build(kind, operands)
    except Misfit:
        raise
    except Exception as error:  # coremltools raises errors of every kind
        reason = one_line(str(error)) or type(error).__name__
        raise Misfit(f"coremltools refuses it: {reason}") from None
    if complaint := gap(kind, operands, results):
        raise Misfit(complaint)
    return results


def _check_names(kind: str, operands: Operands) -> None:
    slots = coremltools_builder.slots(kind)
    if strange := operands.keys() - slots.keys():
        raise Misfit(f"there is no input {min(strange)!r}; expected {', '.join(slots)}")
    for name, slot in slots.items():
        if not operands.get(name) and not slot.optional:
            raise Misfit(f"it has no input {name}")


def _written(operands: Operands) -> list[TensorType]:
    """As coremltools has it, whose own operation for this gives a value, and has other names."""
    bound = [operand for name in ("input", "data") for operand in operands.get(name, ())]
    if operands.keys() != {"input", "data"} or [o.state for o in bound] != [True, False]:
        raise Misfit(f"it has the inputs {', '.join(operands)}; expected a state input, and data")
    state, data = bound
    if state.type != data.type:
        raise Misfit(f"its data are {data.type}; expected {state.type} as the state")
    return []
