"""The items of a plan, the layouts that each may get in an export format, and their bytes.

An item is a matrix, several that get one layout, or a group of the head's rows. A layout is a
quantization scheme that the format can store, such as int4 in blocks of 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.format import Format
from rgexport.export.storage import OffsetAllocator
from rgexport.export.tokenizer import bytes_to_add
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors
from rgexport.quantize.schemes.base import nbytes_of
from rgexport.quantize.schemes.registry import FLOAT32, Plan, Uniform, candidates
from rgexport.quantize.schemes.row_groups import group_rows

_SMALLEST_GROUP = 256
"""Rows of the embedding in the smallest groups; the largest group has half of all rows."""


def layout_bytes(form: Format, shape: tuple[int, ...]) -> dict[Uniform, int]:
    """Returns layout → stored bytes of a matrix; only float32 if no scheme fits its shape."""
    layouts: list[Uniform] = []
    for scheme in candidates():
        layout = form.candidate(scheme, shape)
        if layout is not None:
            layouts.append(layout)
    if not layouts:
        layouts.append(FLOAT32)

    sizes: dict[Uniform, int] = {}
    for layout in layouts:
        part_shapes = form.part_shapes(shape, layout)
        sizes[layout] = nbytes_of(part_shapes)
    return sizes


def artifact_bytes(form: Format, plan: Plan, checkpoint: Checkpoint) -> int:
    """Estimates the size of an artifact, to within a few kB for each layer."""
    specs = model_tensors(checkpoint.config)
    shapes = {name: spec.shape for name, spec in specs.items()}
    weights = OffsetAllocator("", form.alignment, header=form.part_header)
    weights.allocate(plan, shapes, form.part_shapes)

    graph_bytes = 0
    for name, scheme in plan.items():
        rows = shapes[name][0]
        graph_bytes += scheme.index_bytes(rows)
        graph_bytes += sum(layout.extra_graph_bytes for layout in scheme.uniform)

    overhead = form.overhead_bytes(checkpoint)
    if form.completes_tokenizer:
        overhead += bytes_to_add(checkpoint.tokenizer_files)
    return weights.size + graph_bytes + overhead


@dataclass(frozen=True)
class PlanItem:
    """Matrices that get one layout, or a group of the embedding's rows.

    Attributes:
        tensors: the names of matrices with one shape and one input.
        shape: of each matrix, or of the group of rows.
        rows: the numbers of the group's rows, the most important first; None for whole matrices.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, int]
    rows: np.ndarray | None = None

    @property
    def weights(self) -> int:
        """The number of weights in all matrices."""
        rows, columns = self.shape
        return len(self.tensors) * rows * columns


def items_of(config: GriffinConfig, importance: np.ndarray | None) -> list[PlanItem]:
    """Returns the items of a model: the head, then the linears by layer.

    Linears of one shape and input get one layout, so that kernels can compute them together. With
    the importance of the head's rows, float32 [vocab], they are cut into groups.
    """
    names_of: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, spec in model_tensors(config).items():
        site = input_site(name)
        if site is not None:
            names_of.setdefault((site, spec.shape), []).append(name)

    items: list[PlanItem] = []
    for (_, (rows, columns)), names in names_of.items():
        if names == [EMBEDDING] and importance is not None:
            for ids in _row_groups(importance):
                shape = len(ids), columns
                items.append(PlanItem((EMBEDDING,), shape, ids))
        else:
            items.append(PlanItem(tuple(names), (rows, columns)))
    return items


def _row_groups(importance: np.ndarray) -> list[np.ndarray]:
    """Returns groups of row numbers, the most important rows first.

    The last group has half of all rows, the one before it half of the others, and so on.
    """
    order = np.argsort(-importance, kind="stable")
    ends = [len(order)]
    while ends[0] // 2 >= _SMALLEST_GROUP:
        ends.insert(0, ends[0] // 2)
    return np.split(order, ends[:-1])


def plan_of(config: GriffinConfig, items: Sequence[PlanItem], layouts: Sequence[Uniform]) -> Plan:
    """Returns the plan with these layouts of the items, and float32 for all other tensors."""
    plan: Plan = dict.fromkeys(model_tensors(config), FLOAT32)
    row_ids: dict[Uniform, list[np.ndarray]] = {}
    for item, layout in zip(items, layouts, strict=True):
        if item.rows is None:
            plan |= dict.fromkeys(item.tensors, layout)
        else:
            row_ids.setdefault(layout, []).append(item.rows)

    if row_ids:
        groups = {layout: np.concatenate(ids) for layout, ids in row_ids.items()}
        plan[EMBEDDING] = group_rows(groups)
    return plan
