"""Plans with row groups, for the tests of all formats."""

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import Affine, Mixed, Plan, RowGroup
from rgexport.quantize.schemes.row_groups import rows_text

INT4, INT8 = Affine(4, 32, symmetric=True), Affine(8, 32, symmetric=True)
ASYMMETRIC = Affine(4, 32, symmetric=False)
BIASED, PLAIN = "layers.0.mlp_block.up_proj.weight", "layers.2.temporal_block.q_proj.weight"
"""A linear with a bias; one without."""


def split_plan(config: GriffinConfig, *, in_order: bool = False, symmetric: bool = False) -> Plan:
    """The embedding in three groups, and linears in two, with a bias and without."""
    rows = config.vocab_size
    chosen = np.random.default_rng(3).permutation(rows)
    first, second = np.sort(chosen[: rows // 5]), np.sort(chosen[rows // 5 : rows // 2])
    if in_order:
        first, second = np.arange(rows // 5), np.arange(rows // 5, rows // 2)
    named = (first, INT8), (second, INT4 if symmetric else ASYMMETRIC)
    groups = (RowGroup(rows_text(ids), scheme) for ids, scheme in named)
    table = Mixed((*groups, RowGroup(None, INT4)))
    linear = Mixed((RowGroup("1,4-6", INT8), RowGroup(None, INT4)))
    plan = make_plan(config, INT4, table)
    return plan | {name: linear for name in (BIASED, PLAIN) if name in model_tensors(config)}


def decoded(rows: np.ndarray, scheme: Mixed) -> np.ndarray:
    """What is left of a matrix: each row by itself, by the scheme of the group that names it."""
    owner = np.full(len(rows), len(scheme.groups) - 1)
    for index, group in enumerate(scheme.groups[:-1]):
        assert group.rows is not None
        for part in group.rows.split(","):
            first, _, last = part.partition("-")
            owner[int(first) : int(last or first) + 1] = index
    found = [
        one.round_trip("w", row[None], None, np.arange(1))
        for row, one in zip(rows, (scheme.groups[i].scheme for i in owner), strict=True)
    ]
    return np.concatenate(found)
