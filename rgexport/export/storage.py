"""The layout of weights in data files, and the writer that fills them.

Each slab is read, encoded and written at its own offset, several at a time. A tensor with several
row groups has a matrix for each; the group's number begins its parts' names: `0.data`, `0.scales`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rgexport.export.manifest import COLUMNS, StoredPart, StoredTensor
from rgexport.export.program import Node
from rgexport.griffin.config import RG_LRU_C
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.parallelism import parallel_jobs
from rgexport.progress import task
from rgexport.quantize.schemes.registry import Mixed, Parts, PartShapes, Plan, Scheme, Uniform

Shape = tuple[int, ...]
_Values = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Transform:
    """Maps float32 rows of a checkpoint to rows of the file and back, and the canonical shape."""

    store: _Values = lambda rows: rows
    restore: _Values = lambda rows: rows
    shape: Callable[[Shape], Shape] = lambda shape: shape


def _decay(a_param: np.ndarray) -> np.ndarray:
    p = a_param.astype(np.float64)
    softplus = np.log1p(np.exp(-np.abs(p))) + np.maximum(p, 0)
    return (RG_LRU_C * softplus).astype(np.float32)


def _a_param(decay: np.ndarray) -> np.ndarray:
    """Inverts softplus: log(exp(s) - 1) = s + log(1 - exp(-s))."""
    softplus = np.maximum(decay.astype(np.float64) / RG_LRU_C, np.finfo(np.float32).tiny)
    return (softplus + np.log(-np.expm1(-softplus))).astype(np.float32)


PLAIN = Transform()
NORM = Transform(lambda w: w + np.float32(1), lambda w: w - np.float32(1))
DECAY = Transform(_decay, _a_param)


@dataclass(frozen=True)
class StoredGroup:
    """Some `rows` of a tensor (None: all), and the `prefix` of their parts' names there."""

    prefix: str
    stored: StoredTensor
    label: str
    rows: np.ndarray | None = None

    def run(self, start: int, stop: int) -> tuple[int, int]:
        if self.rows is None:
            return start, stop
        first, last = np.searchsorted(self.rows, [start, stop]).tolist()
        return first, last

    def chosen(self, start: int, stop: int) -> slice | np.ndarray:
        if self.rows is None:
            return slice(None)
        return self.rows[slice(*self.run(start, stop))] - start


def groups_of(stored: StoredTensor) -> tuple[StoredGroup, ...]:
    return tuple(
        StoredGroup("", stored, label)
        if rows is None
        else StoredGroup(f"{i}.", _group_tensor(stored, f"{i}.", uniform, len(rows)), label, rows)
        for i, (label, uniform, rows) in enumerate(stored.scheme.row_groups(stored.shape[0]))
    )


def with_groups(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    groups = {
        group_name(name, i): group.stored
        for name, stored in tensors.items()
        for i, group in enumerate(groups_of(stored))
        if group.rows is not None
    }
    return {**tensors, **groups}


def group_name(tensor: str, index: int) -> str:
    return f"{tensor}.{index}"


def lower_by_groups(
    g: Any, node: Node, lower: Callable[..., Any], grouped: Mapping[str, Callable[..., Any]]
) -> Any:
    """Lowers a node; one with a weight in row groups by its function in `grouped`.

    `g` is the format's emitter. The function gets the groups as weights, and the place of each row
    among their rows, or None for the same order.
    """
    combine = grouped.get(node.op)
    weight = node.inputs[1] if combine else None
    scheme = g.stored(weight).scheme if weight else None
    if combine is None or weight is None or not isinstance(scheme, Mixed):
        return lower(g, node)
    groups = [
        replace(weight, name=group_name(weight.name, i), shape=(size, *weight.shape[1:]))
        for i, size in enumerate(scheme.group_sizes(weight.size(0)))
    ]
    return [combine(g, node, lower, groups, scheme.positions(weight.size(0)))]


def part_shapes_by_group(
    shape: Shape, scheme: Scheme, part_shapes: Callable[[Shape, Uniform], PartShapes]
) -> PartShapes:
    """Returns the parts of a tensor; the group's number begins their names if it has several."""
    if len(scheme.uniform) == 1:
        return part_shapes(shape, scheme.uniform[0])
    sizes = scheme.group_sizes(shape[0])
    return {
        f"{i}.{label}": dtype_and_shape
        for i, (uniform, size) in enumerate(zip(scheme.uniform, sizes, strict=True))
        for label, dtype_and_shape in part_shapes((size, *shape[1:]), uniform).items()
    }


def _group_tensor(stored: StoredTensor, prefix: str, scheme: Uniform, size: int) -> StoredTensor:
    labels = [label for label in stored.parts if label.startswith(prefix)]
    parts = {label.removeprefix(prefix): stored.parts[label] for label in labels}
    return StoredTensor((size, *stored.shape[1:]), scheme, parts)


SLAB_BYTES = 1 << 20
"""Bytes of source weights. As float32 a slab fits the L2 cache, which makes encoding 2x faster."""
_LARGER = 4  # factor by which slabs are larger that are written in short runs, or need statistics
_MAX_WORKERS = 8
_PENDING = 3  # slabs for each worker that are being encoded, or wait for their turn

PartShapesOf = Callable[[Shape, Scheme], PartShapes]
Encode = Callable[[str, np.ndarray, np.ndarray, StoredTensor], Parts]
"""Name, rows in the checkpoint's dtype, their numbers, stored tensor or group → parts."""
_Result = TypeVar("_Result")


def aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@dataclass
class OffsetAllocator:
    file: str
    alignment: int
    size: int = 0
    header: int = 0

    def allocate(
        self, plan: Plan, shapes: Mapping[str, Shape], part_shapes: PartShapesOf
    ) -> dict[str, StoredTensor]:
        tensors = {}
        for name, scheme in plan.items():
            parts = {}
            for label, (dtype, shape) in part_shapes(shapes[name], scheme).items():
                offset = aligned(self.size, self.alignment) + self.header
                parts[label] = StoredPart(self.file, offset, dtype, shape)
                self.size = offset + parts[label].nbytes
            tensors[name] = StoredTensor(shapes[name], scheme, parts)
        return tensors


def fill(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Mapping[str, StoredTensor],
    weights: WeightSource,
    encode: Encode,
    written: Callable[[str, Parts], None] = lambda name, slab: None,
) -> None:
    """Writes files of the given sizes with weights; `written` gets each slab's name and parts."""
    for file_name, file_size in sizes.items():
        path = folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(file_size)

    def slabs() -> Iterator[Callable[[], tuple[str, Parts, int]]]:
        for name, stored in tensors.items():
            source, rows, together = weights[name], stored.shape[0], stored.rows_together
            size = slab_bytes(stored.scheme, by_columns=COLUMNS in stored.parts)
            for start, stop in slab_bounds(rows, source.row_bytes, size, together):
                yield partial(_write_slab, folder, name, stored, source, encode, start, stop)

    with task("Writing the weights", sum(weights[name].nbytes for name in tensors)) as advance:
        for name, slab, source_bytes in in_order(slabs()):
            written(name, slab)
            advance(source_bytes)


def slab_bytes(scheme: Scheme, *, by_columns: bool = False) -> int:
    return SLAB_BYTES * (_LARGER if by_columns or scheme.needs_statistics else 1)


def _write_slab(
    folder: Path,
    name: str,
    stored: StoredTensor,
    source: RowTensor,
    encode: Encode,
    start: int,
    stop: int,
) -> tuple[str, Parts, int]:
    """Encodes and writes rows; returns the name, their parts, and bytes read."""
    rows = source.read(start, stop)
    slab: Parts = {}
    for group in groups_of(stored):
        chosen = group.chosen(start, stop)
        ids = np.arange(start, stop)[chosen]
        if not len(ids):
            continue
        first, last = group.run(start, stop)
        for label, encoded in encode(name, rows[chosen], ids, group.stored).items():
            array = np.ascontiguousarray(encoded)
            _write_part(folder, group.stored, label, first, last, array)
            slab[group.prefix + label] = array
    return name, slab, rows.nbytes


def _write_part(
    folder: Path, stored: StoredTensor, label: str, start: int, stop: int, array: np.ndarray
) -> None:
    part = stored.parts[label]
    if label == COLUMNS:
        mapped = np.memmap(folder / part.file, part.dtype, "r+", part.offset, part.shape)
        mapped[:, start:stop] = array.T
        return
    # Each thread opens the file itself: `pwrite` does not exist on Windows.
    with open(folder / part.file, "r+b") as file:
        file.seek(stored.row_offset(label, start))
        file.write(array.reshape(-1).view(np.uint8).data)


def in_order(jobs: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """Yields results of jobs, in order; few of them run at a time, each on its thread."""
    pending: deque[Future[_Result]] = deque()
    workers = parallel_jobs(_MAX_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > _PENDING * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
