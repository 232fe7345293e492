"""Operations that move elements and change none."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rgexport.runtimes.coreml.interpreter.call import Call, Given
from rgexport.runtimes.coreml.interpreter.weights import Unsupported, Weight

_Index = tuple[Any, ...]


def identity(given: Given) -> Call:
    """The same."""
    return given.call(lambda x: x, "x")


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


def expand_dims(given: Given) -> Call:
    """New axes of length 1."""
    axes = given.integers("axes")
    return given.call(lambda x: np.expand_dims(x, axes), "x")


def squeeze(given: Given) -> Call:
    """Without axes of length 1; one that is named and longer stays."""
    axes = given.integers("axes", None)

    def function(x: np.ndarray) -> np.ndarray:
        wanted = range(x.ndim) if axes is None else axes
        return np.squeeze(x, tuple(axis for axis in wanted if x.shape[axis] == 1))

    return given.call(function, "x")


def concat(given: Given) -> Call:
    """One behind the other along an axis, or alternating if interleaved."""
    axis = given.integer("axis")
    if not given.flag("interleave", False):
        return given.call(lambda *values: np.concatenate(values, axis=axis), "values")

    def interleaved(*values: np.ndarray) -> np.ndarray:
        at = axis % values[0].ndim
        shape = list(values[0].shape)
        shape[at] *= len(values)
        return np.stack(values, axis=at + 1).reshape(shape)

    return given.call(interleaved, "values")


def stack(given: Given) -> Call:
    """Along a new axis."""
    axis = given.integer("axis")
    return given.call(lambda *values: np.stack(values, axis=axis), "values")


def split(given: Given) -> Call:
    """Cut along an axis, into equal parts or those of `split_sizes`."""
    axis = given.integer("axis")
    sizes = given.integers("split_sizes", None)
    count = given.integer("num_splits", len(given.operation.outputs))
    cuts: Any = count if sizes is None else np.cumsum(sizes)[:-1].tolist()
    return given.call(lambda x: np.split(x, cuts, axis=axis), "x")


def tile(given: Given) -> Call:
    """Repeated along each axis."""
    counts = given.integers("reps")
    return given.call(lambda x: np.tile(x, counts), "x")


def fill(given: Given) -> Call:
    """One value everywhere."""
    dtype = given.operation.outputs[0][1].dtype
    value = given.value("value", np.zeros((), dtype)).reshape(()).astype(dtype)
    return given.call(lambda shape: np.full(shape.tolist(), value), "shape")


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


def pad(given: Given) -> Call:
    """`pad` holds (before, after) of the last axes."""
    widths, mode = given.integers("pad"), given.word("mode", "constant")
    value = given.number("constant_val", 0.0)
    if mode not in _PAD_MODES or len(widths) % 2:
        raise Unsupported(f"it pads by {widths} in mode {mode}")
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    options = {"constant_values": value} if mode == "constant" else {}

    def function(x: np.ndarray) -> np.ndarray:
        every = [(0, 0)] * (x.ndim - len(pairs)) + pairs
        return np.pad(x, every, _PAD_MODES[mode], **options)  # type: ignore[call-overload]

    return given.call(function, "x")


def slice_by_index(given: Given) -> Call:
    """`x[begin:end:stride]` of each axis, with masks for open ends and single indices."""
    index, dynamic = _index(given)
    if not dynamic:
        fixed = index()
        return given.call(lambda x: x[fixed], "x")
    return given.call(lambda x, *bounds: x[index(*bounds)], "x", *dynamic)


def slice_update(given: Given) -> Call:
    """A copy of `x` in which that slice is `update`."""
    index, dynamic = _index(given)

    def function(x: np.ndarray, update: np.ndarray, *bounds: np.ndarray) -> np.ndarray:
        updated = x.copy()
        target = updated[index(*bounds)]
        if target.shape != update.shape:
            raise ValueError(f"a slice {target.shape} is updated with {update.shape}")
        updated[index(*bounds)] = update
        return updated

    return given.call(function, "x", "update", *dynamic)


def _index(given: Given) -> tuple[Callable[..., _Index], tuple[str, ...]]:
    """A function that gives the index, and which bounds it takes as arguments."""
    rank = given.rank("x")
    no = (False,) * rank
    begin_mask, end_mask, squeeze_mask = (
        given.integers(f"{name}_mask", no) for name in ("begin", "end", "squeeze")
    )
    stride = given.integers("stride", (1,) * rank)
    fixed = {name: given.integers(name) for name in ("begin", "end") if name in given.constants}
    dynamic = tuple(name for name in ("begin", "end") if name not in fixed)
    lengths = {len(v) for v in (begin_mask, end_mask, squeeze_mask, stride, *fixed.values())}
    if lengths != {rank}:
        raise Unsupported(f"its bounds and masks do not have one number for each of {rank} axes")

    def index(*bounds: np.ndarray) -> _Index:
        values = fixed | {n: b.reshape(-1).tolist() for n, b in zip(dynamic, bounds, strict=True)}
        axes = zip(
            *(values["begin"], values["end"], stride, begin_mask, end_mask, squeeze_mask),
            strict=True,
        )
        return tuple(
            (0 if open_ else begin)
            if single
            else slice(None if open_ else begin, None if endless else end, step)
            for begin, end, step, open_, endless, single in axes
        )

    return index, dynamic


def gather(given: Given) -> Call:
    """Rows of `x` along an axis; a weight in a file is read only where it is asked for."""
    axis, batch = given.integer("axis", 0), given.integer("batch_dims", 0)
    given.flag("validate_indices", False)  # here they always are

    def function(x: Any, indices: np.ndarray) -> np.ndarray:
        length = (x.type.shape if isinstance(x, Weight) else x.shape)[axis]
        if indices.size and (indices.min() < 0 or indices.max() >= length):
            raise ValueError(f"an index is not below {length}")
        if not isinstance(x, Weight):
            return _gathered(x, indices, axis, batch)
        if axis == 0 and batch == 0:
            return x.rows(indices)
        return _gathered(x.whole(), indices, axis, batch)

    return given.call(function, "x", "indices", lazy=("x",))


def _gathered(x: np.ndarray, indices: np.ndarray, axis: int, batch: int) -> np.ndarray:
    if not batch:
        return np.take(x, indices, axis=axis)
    inner = axis if axis < 0 else axis - 1
    parts = [_gathered(a, i, inner, batch - 1) for a, i in zip(x, indices, strict=True)]
    return np.stack(parts)


def gather_along_axis(given: Given) -> Call:
    """An element of `x` for each index along an axis."""
    axis = given.integer("axis", 0)
    given.flag("validate_indices", False)
    return given.call(lambda x, i: np.take_along_axis(x, i, axis=axis), "x", "indices")
