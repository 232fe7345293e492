"""Faults planted in ONNX artifacts: each fails, and its layer and site are named.

With int4 weights activations are int8, whose noise hides most faults in the logits.
"""

import pytest

from tests.validate.faults import onnx_edits as edits
from tests.validate.faults.conftest import CONFIG, require_named

LRU, ATTENTION = "temporal_block.rg_lru", "layers.2.temporal_block.attention"
GATE, GELU = f"layers.1.{LRU}.input_gate", "layers.1.mlp_block.gelu"
GRAPH: dict[str, tuple[edits.Edit, str | None]] = {
    "functions in their place": (edits.flat(), None),
    "soft cap dropped": (edits.without_soft_cap, "logits"),
    "window one less": (edits.flat(edits.with_window(CONFIG.window - 1)), ATTENTION),
    "window one more": (edits.flat(edits.with_window(CONFIG.window + 1)), ATTENTION),
    "input gate in fp16": (edits.in_half(GATE), GATE),
    "GELU with erf": (edits.flat(edits.with_attribute(GELU, "approximate", "none")), GELU),
    "RG-LRU's state not written": (edits.not_written("3.recurrent_state"), f"layers.3.{LRU}"),
    "values not written": (edits.not_written("2.value"), ATTENTION),
}
"""What is done to a graph, and the site that is to be named if it is wrong."""


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
