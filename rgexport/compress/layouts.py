"""The layouts that a plan chooses from in each format, and the bytes that they take."""

from dataclasses import dataclass
from math import prod

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.format import Format, format_of
from rgexport.export.storage import DataFileLayout
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.scheme import FLOAT32, Plan, Scheme, Uniform, candidates

Shape = tuple[int, ...]

_WIDENING_BYTES = 6_300
"""Bytes of the nodes that widen 3 bits to 4, for each matrix or row group."""


@dataclass(frozen=True)
class FormatLayouts:
    """The layouts of a format; `schemes` are the candidates."""

    form: Format
    schemes: tuple[Uniform, ...] = tuple(candidates())

    def options(self, shape: Shape) -> dict[Uniform, int]:
        """Returns the layouts that fit a matrix, and their bytes; float32 if none fits."""
        fits = [self.form.candidate(scheme, shape) for scheme in self.schemes]
        layouts = [layout for layout in fits if layout is not None] or [FLOAT32]
        return {layout: self._nbytes(shape, layout) for layout in layouts}

    def artifact_bytes(self, plan: Plan, checkpoint: Checkpoint) -> int:
        """Estimates the bytes of an artifact, to within a few kB for each layer."""
        shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
        layout = DataFileLayout("", self.form.alignment, header=self.form.part_header)
        layout.tensors(plan, shapes, self.form.part_layouts)
        extra = sum(_bytes_beside(scheme, shapes[name][0]) for name, scheme in plan.items())
        return layout.size + extra + self.form.overhead_bytes(checkpoint)

    def _nbytes(self, shape: Shape, scheme: Scheme) -> int:
        parts = self.form.part_layouts(shape, scheme).values()
        return sum(prod(rows) * np.dtype(dtype).itemsize for dtype, rows in parts)


def layouts_of(kind: str) -> FormatLayouts:
    """Returns the layouts of a format.

    Raises:
        RequestError: there is no such format.
    """
    if kind not in FORMATS:
        raise RequestError(f"--format is {kind!r}; expected one of {', '.join(FORMATS)}")
    return FormatLayouts(format_of(kind))


def _bytes_beside(scheme: Scheme, rows: int) -> int:
    """Estimates the bytes of a tensor beside its parts.

    They are the nodes that widen integers of 3 bits; and the rows of row groups, which a manifest
    lists twice, with the index of each row in the graph.
    """
    widened = sum(one.level_bits == 3 for one in scheme.uniform) * _WIDENING_BYTES
    return widened + scheme.index_bytes(rows)
