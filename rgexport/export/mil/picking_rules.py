"""Types of the results of operations that pick items: slices, pieces, and items by index."""

from rgexport.export.mil.program import TensorType
from rgexport.export.mil.signatures import (
    ALL,
    BOOL,
    FLAG,
    INT32,
    INTEGERS,
    SETTING,
    SMALL,
    VALUES,
    Arguments,
    Misfit,
    Signature,
    Slot,
    checked_axis,
)

_RANGES: Signature = {
    "begin": Slot(INTEGERS, "U"),
    "end": Slot(INTEGERS, "U"),
    "stride": Slot(INTEGERS, "U", constant=True, optional=True),
    "begin_mask": FLAG,
    "end_mask": FLAG,
    "squeeze_mask": FLAG,
}
SLICE_BY_INDEX: Signature = {"x": Slot(ALL), **_RANGES}
SLICE_UPDATE: Signature = {"x": Slot(ALL, "T"), "update": Slot(ALL, "T"), **_RANGES}
SLICE_BY_SIZE: Signature = {
    "x": Slot(ALL),
    "begin": Slot(INTEGERS, "U"),
    "size": Slot(INTEGERS, "U"),
}
SPLIT: Signature = {
    "x": Slot(VALUES),
    "num_splits": SETTING,
    "split_sizes": SETTING,
    "axis": Slot(INT32, constant=True),
}
GATHER: Signature = {
    "x": Slot(ALL - BOOL),
    "indices": Slot(SMALL | INT32),
    "axis": SETTING,
    "batch_dims": SETTING,
    "validate_indices": FLAG,
}
GATHER_ALONG_AXIS: Signature = {name: slot for name, slot in GATHER.items() if name != "batch_dims"}


def slice_by_index(given: Arguments) -> list[TensorType] | None:
    """x[begin:end:stride] along each axis; those under the squeeze mask go."""
    shape = _sliced(given)
    return None if shape is None else [TensorType(given.type("x").dtype, shape)]


def slice_update(given: Arguments) -> list[TensorType]:
    """x, with the update in place of a slice."""
    shape, update = _sliced(given), given.shape("update")
    if shape not in (None, update):
        raise Misfit(f"it puts {list(update)} in place of a slice of the shape {list(shape)}")
    return [given.type("x")]


def _sliced(given: Arguments) -> tuple[int, ...] | None:
    shape = given.shape("x")
    rank = len(shape)
    for name in ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask"):
        if given.has(name) and given.shape(name) != (rank,):
            raise Misfit(
                f"its input {name} has the shape {list(given.shape(name))}; expected [{rank}]"
            )
    if not given.known("begin") or not given.known("end"):
        return None
    begin, end = given.integers("begin"), given.integers("end")
    stride = given.integers("stride") if given.has("stride") else (1,) * rank
    first, last, dropped = (
        given.integers(name) if given.has(name) else (0,) * rank
        for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    sizes = []
    for axis, size in enumerate(shape):
        if dropped[axis]:
            checked_axis("begin", begin[axis], size)
            continue
        if not stride[axis]:
            raise Misfit("its input stride is 0; expected a step")
        picked = slice(
            None if first[axis] else begin[axis], None if last[axis] else end[axis], stride[axis]
        )
        sizes.append(len(range(*picked.indices(size))))
        if not sizes[-1]:
            raise Misfit(
                f"it takes [{begin[axis]}:{end[axis]}:{stride[axis]}] of axis {axis} of "
                f"{list(shape)}, which is nothing"
            )
    return tuple(sizes)


def slice_by_size(given: Arguments) -> list[TensorType] | None:
    """`size` items from `begin` on, along each axis; -1 is all that follow."""
    shape = given.shape("x")
    if not given.known("begin") or not given.known("size"):
        return None
    begin, asked = given.integers("begin"), given.integers("size")
    if not len(begin) == len(asked) == len(shape):
        raise Misfit(f"it has {len(begin)} begins and {len(asked)} sizes for {len(shape)} axes")
    sizes = []
    for first, size, all_of in zip(begin, asked, shape, strict=True):
        first = checked_axis("begin", first, all_of)
        sizes.append(all_of - first if size == -1 else size)
        if not 0 < sizes[-1] <= all_of - first:
            raise Misfit(f"it takes {size} items from {first} on, of {all_of}")
    return [TensorType(given.type("x").dtype, tuple(sizes))]


def split(given: Arguments) -> list[TensorType]:
    """Pieces of x along an axis: of equal size, or of the sizes that are given."""
    shape = given.shape("x")
    axis = given.axis("axis", 0, len(shape))
    if given.has("split_sizes"):
        sizes = given.integers("split_sizes")
    else:
        pieces = given.integer("num_splits", 0)
        if pieces < 1 or shape[axis] % pieces:
            raise Misfit(f"it makes {pieces} equal pieces of {shape[axis]} items")
        sizes = (shape[axis] // pieces,) * pieces
    if sum(sizes) != shape[axis] or min(sizes) < 1:
        raise Misfit(f"it makes pieces of {list(sizes)} of {shape[axis]} items")
    dtype = given.type("x").dtype
    return [TensorType(dtype, shape[:axis] + (size,) + shape[axis + 1 :]) for size in sizes]


def gather(given: Arguments) -> list[TensorType]:
    """Slices of x along an axis; its first `batch_dims` axes go with those of the indices."""
    shape, indices = given.shape("x"), given.shape("indices")
    axis = given.axis("axis", 0, len(shape))
    batch = given.integer("batch_dims", 0)
    if not 0 <= batch <= min(axis, len(indices)) or shape[:batch] != indices[:batch]:
        raise Misfit(f"its input batch_dims is {batch}, for {list(shape)} and {list(indices)}")
    result = shape[:axis] + indices[batch:] + shape[axis + 1 :]
    return [TensorType(given.type("x").dtype, result)]


def gather_along_axis(given: Arguments) -> list[TensorType]:
    """Items of x along an axis, by indices for every item of the result."""
    shape, indices = given.shape("x"), given.shape("indices")
    axis = given.axis("axis", 0, len(shape))
    if len(indices) != len(shape) or any(
        a != b for i, (a, b) in enumerate(zip(shape, indices, strict=True)) if i != axis
    ):
        raise Misfit(f"it picks {list(indices)} out of {list(shape)} along axis {axis}")
    return [TensorType(given.type("x").dtype, indices)]
