"""Where each weight lies in the external data file, and what fills it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from rgexport.export.manifest import DATA_FILE, StoredPart, StoredTensor, part_layouts
from rgexport.export.onnx.graph import DTYPES
from rgexport.export.storage import Places, aligned, encode_float, fill
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine, Plan

_ALIGNMENT = 4096
"""Of every part: runtimes map the file, and a map starts at a page."""


class Storage:
    """The layout of the data file: tensors in the plan's order, one after another."""

    def __init__(self, plan: Plan, shapes: dict[str, tuple[int, ...]]):
        places = Places(DATA_FILE, _ALIGNMENT)
        self.tensors = places.tensors(plan, shapes, part_layouts)
        self.size = aligned(places.size, _ALIGNMENT)

    def write(self, folder: Path, weights: WeightSource) -> None:
        """Fills the data file in `folder` from `weights`.

        Raises:
            RequestError: a weight that its scheme cannot hold.
            OSError: the disk is full, or the folder cannot be written.
        """
        path = folder / DATA_FILE
        with open(path, "wb") as file:
            file.truncate(self.size)
        fill(path, self.tensors, weights, _encode)


def initializer(
    part: StoredPart, name: str, shape: tuple[int, ...] | None = None
) -> ir.ExternalTensor:
    """A tensor of the graph over a stored part, optionally seen in another shape."""
    dtype, seen = DTYPES[part.dtype], ir.Shape(shape or part.shape)
    return ir.ExternalTensor(part.file, part.offset, part.nbytes, dtype, shape=seen, name=name)


def _encode(name: str, rows: np.ndarray, tensor: StoredTensor) -> affine.Parts:
    if isinstance(tensor.scheme, Affine):
        return affine.encode(rows, tensor.scheme)
    return encode_float(name, rows, tensor.parts["data"].dtype)
