"""What a plan chooses layouts for: matrices, and groups of the head's rows."""

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
class Item:
    """What gets one layout.

    Attributes:
        tensors: matrices of one shape and, if there are several, of one input.
        rows: of the one tensor, the rows that it is about, most important first; None for all.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, int]
    rows: np.ndarray | None = None

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return len(self.tensors) * self.shape[0] * self.shape[1]


def items_of(config: GriffinConfig, importance: np.ndarray | None) -> list[Item]:
    """All that may be quantized: the head, then the linears by layer.

    Linears of one shape that read the same input get one layout, so that kernels can compute them
    together. With the importance of the head's rows, float32 [vocab], they are cut into groups.
    """
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, spec in model_tensors(config).items():
        if site := input_site(name):
            together.setdefault((site, spec.shape), []).append(name)
    found = []
    for (_, (rows, columns)), names in together.items():
        if names == [EMBEDDING] and importance is not None:
            found += [Item((EMBEDDING,), (len(ids), columns), ids) for ids in _groups(importance)]
        else:
            found.append(Item(tuple(names), (rows, columns)))
    return found


def plan_of(config: GriffinConfig, items: Sequence[Item], layouts: Sequence[Uniform]) -> Plan:
    """The plan in which each item has its layout, and all other tensors are float32."""
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
    """Rows by falling importance, in groups that are twice as large each time."""
    order = np.argsort(-importance, kind="stable")
    ends = [len(order)]
    while ends[0] // 2 >= _SMALLEST_GROUP:
        ends.insert(0, ends[0] // 2)
    return np.split(order, ends[:-1])
