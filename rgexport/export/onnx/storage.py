"""Where each weight lies in the external data file, and the writer that fills it.

The layout is known before the first weight is read. The writer then streams: a slab is read,
encoded and written at its own offset, several slabs at a time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rgexport.errors import RequestError
from rgexport.export.manifest import DATA_FILE, StoredPart, StoredTensor, part_layouts
from rgexport.export.onnx.graph import DTYPES
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import task
from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine, Plan, Scheme

_ALIGNMENT = 4096
"""Of every part: runtimes map the file, and a map starts at a page."""

_SLAB_BYTES = 1 << 20
"""Of source weights; its float32 form fits the L2 cache, which makes encoding 2x faster."""

_WORKERS = 2
_IN_FLIGHT = 4


class Storage:
    """The layout of the data file: tensors in the plan's order, one after another."""

    def __init__(self, plan: Plan, shapes: dict[str, tuple[int, ...]]):
        self.size = 0
        self.tensors = {
            name: StoredTensor(shapes[name], scheme, self._place(shapes[name], scheme))
            for name, scheme in plan.items()
        }

    def _place(self, shape: tuple[int, ...], scheme: Scheme) -> dict[str, StoredPart]:
        layouts = part_layouts(shape, scheme)
        return {name: self._part(*layout) for name, layout in layouts.items()}

    def _part(self, dtype: str, shape: tuple[int, ...]) -> StoredPart:
        part = StoredPart(DATA_FILE, self.size, dtype, shape)
        self.size = -(-(part.offset + part.nbytes) // _ALIGNMENT) * _ALIGNMENT
        return part

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
                partial(_write_slab, path, name, stored, weights[name], *bounds)
                for name, stored in self.tensors.items()
                for bounds in slab_bounds(stored.shape[0], weights[name].row_bytes, _SLAB_BYTES)
            )
            _run_bounded(slabs, advance)


def initializer(
    part: StoredPart, name: str, shape: tuple[int, ...] | None = None
) -> ir.ExternalTensor:
    """A tensor of the graph over a stored part, optionally seen in another shape."""
    dtype, seen = DTYPES[part.dtype], ir.Shape(shape or part.shape)
    return ir.ExternalTensor(part.file, part.offset, part.nbytes, dtype, shape=seen, name=name)


def _write_slab(
    path: Path, name: str, stored: StoredTensor, source: RowTensor, start: int, stop: int
) -> int:
    """Encodes and writes rows `start` to `stop`; returns the bytes that were read."""
    rows = source.read(start, stop)
    # A file handle of its own, since `pwrite` does not exist everywhere.
    with open(path, "r+b") as file:
        for label, array in _encode(name, rows, stored).items():
            part = stored.parts[label]
            file.seek(part.offset + start * part.row_bytes)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return rows.nbytes


def _encode(name: str, rows: np.ndarray, tensor: StoredTensor) -> affine.Parts:
    """Rows as they are stored.

    Raises:
        RequestError: a weight that float16 cannot hold.
    """
    if isinstance(tensor.scheme, Affine):
        return affine.encode(rows, tensor.scheme)
    dtype = tensor.parts["data"].dtype
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype)
    if not np.isfinite(stored).all():
        raise RequestError(
            f"{name} holds {np.abs(rows).max():.4g}, more than {dtype} can: "
            "store it in another precision"
        )
    return {"data": stored}


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
