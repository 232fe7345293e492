"""Weights with scales of two levels: stored as such, unpacked by kernels and by standard ops."""

import numpy as np
import pytest

from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import Affine, Mixed, Plan, RowGroup, TwoLevel
from rgexport.quantize.schemes.row_groups import rows_text
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS
from tests.sessions import distance, random_tokens

pytestmark = pytest.mark.full
LINEAR = "layers.0.mlp_block.up_proj.weight"
SCHEMES = [TwoLevel(bits, block) for bits, block in ((2, 16), (3, 32), (4, 64), (5, 32), (6, 128))]


def plan_of(name: str, scheme: TwoLevel, *, groups: bool = False) -> Plan:
    plan = make_plan(ODD_CONFIGS[name], scheme, scheme)
    if groups:
        rows = rows_text(np.arange(3, 40, 2))
        plan[EMBEDDING] = Mixed((RowGroup(rows, Affine(8, 32, True)), RowGroup(None, scheme)))
    return plan


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("name", ["regular", "not_by_32", "one_head"])
def test_products_are_those_of_the_weights(name, scheme, groups, exact, tmp_path):
    """Standard ops are exact; kernels round activations."""
    config, plan = ODD_CONFIGS[name], plan_of(name, scheme, groups=groups)
    artifact, _ = export_random(config, tmp_path, None, plan=plan, exact=exact)
    stored = artifact.manifest.tensors[LINEAR]
    rows, columns = stored.shape
    padded = -(-columns // scheme.block) * scheme.block
    assert stored.parts["planes"].nbytes == rows * padded * scheme.bits / 8
    assert artifact.manifest.precision == f"int{scheme.bits}"
    tokens = random_tokens(config, 1, 20)
    reference = Reference(config, artifact.weights)
    expected = reference.logits(reference.run(tokens)[0])
    limit = 1e-5 if exact else 0.12
    assert distance(OrtSession(artifact).prefill(tokens, 20), expected) < limit
