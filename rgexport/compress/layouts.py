"""Layouts that a plan may choose in each export format, and estimates of their bytes.

A layout is a quantization scheme that the format can store, such as int4 in blocks of 32. A plan
has a layout for every tensor, or for each of its row groups.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.format import Format, format_of
from rgexport.export.storage import OffsetAllocator
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.scheme import FLOAT32, Plan, Scheme, Uniform, candidates

Shape = tuple[int, ...]

_UNPACKING_BYTES = 6_300
"""Bytes of the graph nodes that unpack 3-bit integers of one matrix or row group to 4 bits."""


@dataclass(frozen=True)
class FormatLayouts:
    """The layouts of one format; `schemes` are those that plans try."""

    form: Format
    schemes: tuple[Uniform, ...] = tuple(candidates())

    def layout_bytes(self, shape: Shape) -> dict[Uniform, int]:
        """Returns layout → stored bytes of a matrix; only float32 if no scheme fits its shape."""
        fitting = [self.form.candidate(scheme, shape) for scheme in self.schemes]
        layouts = [layout for layout in fitting if layout is not None] or [FLOAT32]
        return {layout: self._nbytes(shape, layout) for layout in layouts}

    def artifact_bytes(self, plan: Plan, checkpoint: Checkpoint) -> int:
        """Estimates the size of an artifact, to within a few kB for each layer."""
        shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
        weights = OffsetAllocator("", self.form.alignment, header=self.form.part_header)
        weights.allocate(plan, shapes, self.form.part_shapes)
        graph = sum(_graph_bytes(scheme, shapes[name][0]) for name, scheme in plan.items())
        return weights.size + graph + self.form.overhead_bytes(checkpoint)

    def _nbytes(self, shape: Shape, layout: Uniform) -> int:
        parts = self.form.part_shapes(shape, layout).values()
        return sum(prod(part_shape) * np.dtype(dtype).itemsize for dtype, part_shape in parts)


def layouts_of(kind: str) -> FormatLayouts:
    """Returns the layouts of a format, such as `onnx`.

    Raises:
        RequestError: there is no such format.
    """
    if kind not in FORMATS:
        raise RequestError(f"--format is {kind!r}; expected one of {', '.join(FORMATS)}")
    return FormatLayouts(format_of(kind))


def _graph_bytes(scheme: Scheme, rows: int) -> int:
    """Estimates the bytes that the scheme of a tensor adds to the graph and the manifest.

    Integers of 3 bits need nodes that unpack them. Row groups need a list of their rows, twice in
    the manifest, and an index of all rows in the graph.
    """
    three_bit = sum(layout.level_bits == 3 for layout in scheme.uniform)
    return three_bit * _UNPACKING_BYTES + scheme.index_bytes(rows)
