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

_SMALLEST_GROUP = 256  # rows of the embedding in the smallest groups; the largest has half of all
_TWO_LEVEL_BYTES = 1_200  # of a matrix or row group: more parts and nodes than others have


def layout_bytes(form: Format, shape: tuple[int, ...]) -> dict[Uniform, int]:
    """Returns layout → stored bytes of a matrix; only float32 if no scheme fits its shape."""
    fitting = [form.candidate(scheme, shape) for scheme in candidates()]
    layouts = [layout for layout in fitting if layout is not None] or [FLOAT32]
    return {layout: nbytes_of(form.part_shapes(shape, layout)) for layout in layouts}


def artifact_bytes(form: Format, plan: Plan, checkpoint: Checkpoint) -> int:
    """Estimates the size of an artifact, to within a few kB for each layer."""
    shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
    weights = OffsetAllocator("", form.alignment, header=form.part_header)
    weights.allocate(plan, shapes, form.part_shapes)
    graph = 0
    for scheme in plan.values():
        for uniform in scheme.uniform:
            if uniform.needs_local_function:
                graph += _TWO_LEVEL_BYTES
    graph += sum(scheme.index_bytes(shapes[name][0]) for name, scheme in plan.items())
    overhead = form.overhead_bytes(checkpoint)
    if form.completes_tokenizer:
        overhead += bytes_to_add(checkpoint.tokenizer_files)
    return weights.size + graph + overhead


@dataclass(frozen=True)
class PlanItem:
    """Matrices of one shape and input with one layout; or `rows` of one, most important first."""

    tensors: tuple[str, ...]
    shape: tuple[int, int]
    rows: np.ndarray | None = None

    @property
    def weights(self) -> int:
        return len(self.tensors) * self.shape[0] * self.shape[1]


def items_of(config: GriffinConfig, importance: np.ndarray | None) -> list[PlanItem]:
    """Returns the items of a model: the head, then the linears by layer.

    Linears of one shape and input get one layout, so that kernels can compute them together. With
    the importance of the head's rows, float32 [vocab], they are cut into groups.
    """
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, spec in model_tensors(config).items():
        if site := input_site(name):
            together.setdefault((site, spec.shape), []).append(name)
    items = []
    for (_, (rows, columns)), names in together.items():
        if names == [EMBEDDING] and importance is not None:
            items += [
                PlanItem((EMBEDDING,), (len(ids), columns), ids) for ids in _groups(importance)
            ]
        else:
            items.append(PlanItem(tuple(names), (rows, columns)))
    return items


def plan_of(config: GriffinConfig, items: Sequence[PlanItem], layouts: Sequence[Uniform]) -> Plan:
    """Returns the plan with these layouts of the items, and float32 for all other tensors."""
    plan: Plan = {name: FLOAT32 for name in model_tensors(config)}
    groups: dict[Uniform, list[np.ndarray]] = {}
    for item, layout in zip(items, layouts, strict=True):
        if item.rows is None:
            plan |= dict.fromkeys(item.tensors, layout)
        else:
            groups.setdefault(layout, []).append(item.rows)
    if groups:
        plan[EMBEDDING] = group_rows(
            {layout: np.concatenate(ids) for layout, ids in groups.items()}
        )
    return plan


def _groups(importance: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(-importance, kind="stable")
    ends = [len(order)]
    while ends[0] // 2 >= _SMALLEST_GROUP:
        ends.insert(0, ends[0] // 2)
    return np.split(order, ends[:-1])
