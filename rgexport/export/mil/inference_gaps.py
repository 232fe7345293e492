"""What no device can run, though coremltools' inference lets it pass.

Found by asking coremltools 9 for a type of each such operation. Where a release refuses one by
itself, its check here is superfluous.
"""

from collections.abc import Callable

from rgexport.export.mil.operand import Operands
from rgexport.export.mil.program import TensorType


def gap(kind: str, operands: Operands, results: list[TensorType]) -> str | None:
    """What is wrong with an operation for which coremltools inferred the types `results`."""
    if empty := [result for result in results if 0 in result.shape]:
        return f"it gives {empty[0]}, which is nothing"
    check = _CHECKS.get(kind)
    return check(operands) if check else None


def _softmax(operands: Operands) -> str | None:
    axis, rank = _integer(operands, "axis", -1), len(_shape(operands, "x"))
    return None if -rank <= axis < rank else f"its axis is {axis}, but there are {rank} axes"


def _transpose(operands: Operands) -> str | None:
    rank, perm = len(_shape(operands, "x")), operands["perm"][0].known or ()
    once = {axis % rank for axis in perm if -rank <= axis < rank} == {*range(rank)}
    return None if once else f"its perm is {list(perm)}; expected each of {rank} axes once"


def _gather(operands: Operands) -> str | None:
    shape, indices = _shape(operands, "x"), _shape(operands, "indices")
    axis, batch = _integer(operands, "axis", 0), _integer(operands, "batch_dims", 0)
    limit = min(axis % max(len(shape), 1), len(indices))
    if 0 <= batch <= limit and shape[:batch] == indices[:batch]:
        return None
    return f"its batch_dims is {batch}, for {list(shape)} and {list(indices)}"


def _shape(operands: Operands, name: str) -> tuple[int, ...]:
    return operands[name][0].type.shape


def _integer(operands: Operands, name: str, default: int) -> int:
    bound = operands.get(name)
    known = bound[0].known if bound else None
    return int(known[0]) if known else default


_CHECKS: dict[str, Callable[[Operands], str | None]] = {
    "softmax": _softmax,
    "transpose": _transpose,
    "gather": _gather,
}
