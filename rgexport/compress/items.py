"""The items that get one layout in a plan: matrices, and groups of the head's rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors
from rgexport.quantize.row_groups import group_rows
from rgexport.quantize.scheme import FLOAT32, Plan, Uniform

_SMALLEST_GROUP = 256
"""Rows of the embedding in the smallest groups; the largest group has half of all rows."""


@dataclass(frozen=True)
class PlanItem:
    """Matrices, or rows of one, that get the same layout.

    Attributes:
        tensors: matrices of one shape and, if there are several, of one input.
        rows: numbers of the rows of the one tensor, most important first; None for all.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, int]
    rows: np.ndarray | None = None

    @property
    def weights(self) -> int:
        """The number of weights."""
        return len(self.tensors) * self.shape[0] * self.shape[1]


def items_of(config: GriffinConfig, importance: np.ndarray | None) -> list[PlanItem]:
    """Returns the items of a model: the head, then the linears by layer.

    Linears of one shape that read the same input get one layout, so that kernels can compute them
    together. With the importance of the head's rows, float32 [vocab], they are cut into groups.
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
