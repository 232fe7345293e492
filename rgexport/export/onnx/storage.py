"""Where each weight lies in the external data file, and the writer that fills it.

The layout is known before the first weight is read. The writer then streams: a slab is read,
encoded and written at its own offset, several slabs at a time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rgexport.errors import RequestError
from rgexport.export.onnx.graph import DTYPES
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import task
from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine, Float, Plan, Scheme

DATA_FILE = "model.onnx.data"

_ALIGNMENT = 4096
"""Of every region: runtimes map the file, and a map starts at a page."""

_SLAB_BYTES = 1 << 20
"""Of source weights; its float32 form fits the L2 cache, which makes encoding 2x faster."""

_WORKERS = 2
_IN_FLIGHT = 4


@dataclass(frozen=True)
class Region:
    """One array of the data file; its first axis is the tensor's."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes per element of the first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the region."""
        return self.shape[0] * self.row_bytes

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> ir.ExternalTensor:
        """An initializer over the region, optionally seen in another shape."""
        return ir.ExternalTensor(
            DATA_FILE,
            self.offset,
            self.nbytes,
            DTYPES[self.dtype.name],
            shape=ir.Shape(shape or self.shape),
            name=name,
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the plan with the regions of its parts."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    parts: dict[str, Region]

    def encode(self, rows: np.ndarray) -> affine.Parts:
        """Rows as they are stored.

        Raises:
            RequestError: a weight that float16 cannot hold.
        """
        if isinstance(self.scheme, Affine):
            return affine.encode(rows, self.scheme)
        with np.errstate(over="ignore"):
            stored = rows.astype(self.scheme.dtype)
        if not np.isfinite(stored).all():
            raise RequestError(
                f"{self.name} holds {np.abs(rows).max():.4g}, more than {self.scheme.dtype} can: "
                "store it in another precision"
            )
        return {"data": stored}


class Storage:
    """The layout of the data file: tensors in the plan's order, one after another."""

    def __init__(self, plan: Plan, shapes: dict[str, tuple[int, ...]]):
        self.size = 0
        self.tensors = {name: self._place(name, shapes[name], plan[name]) for name in plan}

    def _place(self, name: str, shape: tuple[int, ...], scheme: Scheme) -> StoredTensor:
        if isinstance(scheme, Float):
            parts = {"data": self._region(np.dtype(scheme.dtype), shape)}
        else:
            rows, columns = shape
            parts = {
                part: self._region(dtype, (rows, width))
                for part, (dtype, width) in affine.part_shapes(columns, scheme).items()
            }
        return StoredTensor(name, shape, scheme, parts)

    def _region(self, dtype: np.dtype, shape: tuple[int, ...]) -> Region:
        region = Region(self.size, dtype, shape)
        self.size = -(-(region.offset + region.nbytes) // _ALIGNMENT) * _ALIGNMENT
        return region

    def write(self, folder: Path, weights: WeightSource) -> None:
        """Fills the data file in `folder` from `weights`.

        Raises:
            RequestError: a weight that its scheme cannot hold.
            OSError: the disk is full, or the folder cannot be written.
        """
        total = sum(weights[name].nbytes for name in self.tensors)
        path = folder / DATA_FILE
        with open(path, "wb") as file, task("Writing the weights", total) as advance:
            file.truncate(self.size)
            slabs = (
                partial(_write_slab, path, stored, weights[name], *bounds)
                for name, stored in self.tensors.items()
                for bounds in slab_bounds(stored.shape[0], weights[name].row_bytes, _SLAB_BYTES)
            )
            _run_bounded(slabs, advance)


def _write_slab(path: Path, stored: StoredTensor, source: RowTensor, start: int, stop: int) -> int:
    """Encodes and writes rows `start` to `stop`; returns the bytes that were read."""
    rows = source.read(start, stop)
    # A file handle of its own, since `pwrite` does not exist everywhere.
    with open(path, "r+b") as file:
        for part, array in stored.encode(rows).items():
            region = stored.parts[part]
            file.seek(region.offset + start * region.row_bytes)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return rows.nbytes


def _run_bounded(jobs: Iterator[Callable[[], int]], advance: Callable[[int], None]) -> None:
    """Runs jobs on a few threads with a few in flight, so that memory stays bounded."""
    pending: set[Future[int]] = set()
    with ThreadPoolExecutor(_WORKERS) as pool:
        for job in jobs:
            pending.add(pool.submit(job))
            if len(pending) >= _IN_FLIGHT:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    advance(future.result())
        for future in pending:
            advance(future.result())
