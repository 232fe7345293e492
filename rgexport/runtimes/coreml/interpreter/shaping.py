"""Operations that move elements and change none."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rgexport.runtimes.coreml.interpreter.call import Call, Given
from rgexport.runtimes.coreml.interpreter.weights import Unsupported, Weight


def reshape(given: Given) -> Call:
    """Another shape: -1 is what is left, 0 the dimension of `x` as many places from the right."""
    shape = given.integers("shape")

    def function(x: np.ndarray) -> np.ndarray:
        return x.reshape(_filled(shape, x.shape))

    return given.call((lambda x: x.reshape(shape)) if 0 not in shape else function, "x")


def _filled(shape: Sequence[int], old: Sequence[int]) -> list[int]:
    behind = len(old) - len(shape)
    return [n or (old[behind + i] if behind + i >= 0 else 1) for i, n in enumerate(shape)]


def transpose(given: Given) -> Call:
    """Axes in another order."""
    order = given.integers("perm")
    return given.call(lambda x: x.transpose(order), "x")


def concat(given: Given) -> Call:
    """One behind the other along an axis."""
    axis = given.integer("axis")
    if given.flag("interleave", False):
        raise Unsupported("it is interleaved")
    return given.call(lambda *values: np.concatenate(values, axis=axis), "values")


def slice_by_index(given: Given) -> Call:
    """`x[begin:end:stride]` of each axis, with masks for open ends and single indices."""
    rank, no = given.rank("x"), (False,) * given.rank("x")
    begin, end = given.integers("begin"), given.integers("end")
    stride = given.integers("stride", (1,) * rank)
    masks = [given.integers(f"{name}_mask", no) for name in ("begin", "end", "squeeze")]
    if {len(numbers) for numbers in (begin, end, stride, *masks)} != {rank}:
        raise Unsupported(f"its bounds and masks do not have one number for each of {rank} axes")
    axes = zip(begin, end, stride, *masks, strict=True)
    index = tuple(
        (0 if open_ else first)
        if single
        else slice(None if open_ else first, None if endless else last, step)
        for first, last, step, open_, endless, single in axes
    )
    return given.call(lambda x: x[index], "x")


def gather(given: Given) -> Call:
    """Rows of `x` along an axis; a weight in a file is read only where it is asked for."""
    axis = given.integer("axis", 0)
    given.flag("validate_indices", False)  # here they always are
    if given.integer("batch_dims", 0):
        raise Unsupported("its indices differ along other axes")

    def function(x: Any, indices: np.ndarray) -> np.ndarray:
        length = (x.type.shape if isinstance(x, Weight) else x.shape)[axis]
        if indices.size and (indices.min() < 0 or indices.max() >= length):
            raise ValueError(f"an index is not below {length}")
        if isinstance(x, Weight):
            if axis == 0:
                return x.rows(indices)
            x = x.whole()
        return np.take(x, indices, axis=axis)

    return given.call(function, "x", "indices", lazy=("x",))
