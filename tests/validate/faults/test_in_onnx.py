"""Faults planted in ONNX artifacts: each fails, and its layer and site are named.

With int4 weights activations are int8, whose noise hides most faults in the logits.
"""

import pytest

from rgexport.validate.opening import ValidationRequest
from rgexport.validate.run import validate_artifact
from tests.validate.faults import onnx_edits as edits
from tests.validate.faults.conftest import CONFIG, require_named

LRU, ATTENTION = "temporal_block.rg_lru", "layers.2.temporal_block.attention"
UP = "layers.1.mlp_block.up_proj"
GATE, GELU = f"layers.1.{LRU}.input_gate", "layers.1.mlp_block.gelu"
GRAPH: dict[str, tuple[edits.Edit, str | None]] = {
    "functions in their place": (edits.flat(), None),
    "soft cap dropped": (edits.without_soft_cap, "logits"),
    "window one less": (edits.flat(edits.with_window(CONFIG.window - 1)), ATTENTION),
    "window one more": (edits.flat(edits.with_window(CONFIG.window + 1)), ATTENTION),
    "input gate in fp16": (edits.changed(GATE, edits.IN_HALF), GATE),
    "GELU with erf": (edits.flat(edits.with_attribute(GELU, "approximate", "none")), GELU),
    "products times 1.05": (edits.changed(UP, edits.TIMES), UP),
    "RG-LRU's state not written": (edits.not_written("3.recurrent_state"), f"layers.3.{LRU}"),
    "values not written": (edits.not_written("2.value"), ATTENTION),
}
"""What is done to a graph, and the site that is to be named if it is wrong."""

SHARED = edits.changed("present.3.recurrent_state", edits.OF_FIRST_ROW)
CALLS: dict[str, tuple[edits.Edit, set[str]]] = {
    "nothing": (lambda model: None, set()),
    "decay in a body": (edits.with_op("Div", "Mul", "RgLruScan"), {"sites"}),
    "mask in a body": (edits.with_op("LessOrEqual", "Less", "LocalAttention"), {"sites"}),
    "no reset at position 0": (edits.flat(edits.with_op("Equal", "Less")), {"sites"}),
    "rows share a state": (SHARED, {"batch", "portable"}),
    "long calls": (edits.changed(ATTENTION, edits.ZERO_FROM_512_TOKENS), {"long", "portable"}),
}
"""What only other calls or kernels show, and kinds of checks that fail."""


@pytest.mark.parametrize("kind", ["onnx-int4", pytest.param("onnx-fp32", marks=pytest.mark.full)])
@pytest.mark.parametrize("fault", CALLS)
def test_what_other_runtimes_run(copy, kind, fault):
    edit, kinds = CALLS[fault]
    edits.spoil(artifact := copy(kind), edit)
    result = validate_artifact(artifact, ValidationRequest(max_tokens=600))
    failed = {check.kind for check in result.checks if not check.passed}
    assert failed >= kinds and (result.verdict == "FAIL") == bool(kinds), failed


@pytest.mark.parametrize("fault", GRAPH)
def test_a_wrong_graph(copy, judge, fault):
    edit, site = GRAPH[fault]
    artifact = copy("onnx-int4")
    edits.spoil(artifact, edit)
    result = judge(artifact)
    assert result.structure.status == "differs"
    if site is None:
        assert (result.verdict, result.suspects) == ("PASS", [])
        return
    require_named(result, site)
    assert result.sites.first.site == site
    assert all(check.passed for check in result.checks if check.kind.startswith("weights."))
