"""Faults planted in ONNX artifacts: each fails, and its layer and site are named.

With int4 weights activations are int8, whose noise hides most faults in the logits.
"""

import pytest

from tests.validate.faults.conftest import CONFIG, failed, require_named
from tests.validate.faults.onnx_edits import (
    Edit,
    flat,
    in_half,
    not_written,
    spoil,
    with_attribute,
    with_embedding_scale,
    with_window,
    without_soft_cap,
)

LRU = "temporal_block.rg_lru"
GRAPH: dict[str, tuple[Edit, str]] = {
    "soft cap dropped": (without_soft_cap, "logits"),
    "window one less": (flat(with_window(CONFIG.window - 1)), "layers.2.temporal_block.attention"),
    "window one more": (flat(with_window(CONFIG.window + 1)), "layers.2.temporal_block.attention"),
    "embedding scale not rounded": (with_embedding_scale(CONFIG.width**0.5), "embed_tokens"),
    "input gate in fp16": (in_half(f"layers.1.{LRU}.input_gate"), f"layers.1.{LRU}.input_gate"),
    "recurrence gate in fp16": (
        in_half(f"layers.3.{LRU}.recurrent_gate"),
        f"layers.3.{LRU}.recurrent_gate",
    ),
    "GELU with erf": (
        flat(with_attribute("layers.1.mlp_block.gelu", "approximate", "none")),
        "layers.1.mlp_block.gelu",
    ),
    "RG-LRU's state not written": (not_written("3.recurrent_state"), f"layers.3.{LRU}"),
    "convolution's state not written": (
        not_written("1.conv_state"),
        "layers.1.temporal_block.conv_1d",
    ),
    "keys not written": (not_written("2.key"), "layers.2.temporal_block.attention"),
    "values not written": (not_written("2.value"), "layers.2.temporal_block.attention"),
}
"""What is done to a graph, and the site that is to be named."""


def test_a_flat_one_passes(copy, judge):
    artifact = copy("onnx-int4")
    spoil(artifact, flat())
    result = judge(artifact)
    assert (result.verdict, result.suspects) == ("PASS", [])


@pytest.mark.parametrize("fault", GRAPH)
def test_a_wrong_graph(copy, judge, fault):
    edit, site = GRAPH[fault]
    artifact = copy("onnx-int4")
    spoil(artifact, edit)
    result = judge(artifact)
    require_named(result, site)
    assert result.sites.first.site == site
    assert not any(name.startswith("weights.") for name in failed(result))
