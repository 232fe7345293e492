"""Faults planted in ONNX artifacts: each fails, and its layer and site are named.

With int4 weights activations are int8, whose noise hides most of them in the logits.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.validate.conftest import change_data
from tests.validate.faults.conftest import CONFIG, Copy, Judge, failed, require_named
from tests.validate.faults.onnx_edits import (
    Edit,
    flat,
    in_half,
    not_written,
    reads_half,
    spoil,
    with_attribute,
    with_embedding_scale,
    with_rope_dims,
    with_window,
    without_soft_cap,
)

LRU = "temporal_block.rg_lru"
GRAPH: dict[str, tuple[Edit, str]] = {
    "soft cap dropped": (without_soft_cap, "logits"),
    "window one less": (flat(with_window(CONFIG.window - 1)), "layers.2.temporal_block.attention"),
    "window one more": (flat(with_window(CONFIG.window + 1)), "layers.2.temporal_block.attention"),
    "embedding scale not rounded": (with_embedding_scale(CONFIG.width**0.5), "embed_tokens"),
    "RoPE on all dims": (with_rope_dims(CONFIG.head_dim), "layers.2.temporal_block.rope_q"),
    "input gate in fp16": (in_half(f"layers.1.{LRU}.input_gate"), f"layers.1.{LRU}.input_gate"),
    "recurrence gate in fp16": (
        in_half(f"layers.3.{LRU}.recurrent_gate"),
        f"layers.3.{LRU}.recurrent_gate",
    ),
    "the gates' input in fp16": (
        reads_half(f"layers.0.{LRU}.recurrent_gate"),
        f"layers.0.{LRU}.input_gate",
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


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_flat_one_passes(copy: Copy, judge: Judge, precision: str) -> None:
    artifact = copy(f"onnx-{precision}")
    spoil(artifact, flat())
    result = judge(artifact)
    assert (result.verdict, result.suspects) == ("PASS", [])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fault", GRAPH)
def test_a_wrong_graph(copy: Copy, judge: Judge, fault: str, precision: str) -> None:
    edit, site = GRAPH[fault]
    artifact = copy(f"onnx-{precision}")
    spoil(artifact, edit)
    result = judge(artifact)
    require_named(result, site)
    assert result.sites is not None and result.sites.first is not None
    assert result.sites.first.site == site
    assert not any(name.startswith("weights.") for name in failed(result))


def _transposed(blocks: np.ndarray) -> np.ndarray:
    blocks[0] = blocks[0].T.copy()
    return blocks


def _larger(values: np.ndarray) -> np.ndarray:
    return values * np.float32(1.02)


UP, GATE = "layers.1.mlp_block.up_proj.weight", f"layers.3.{LRU}.recurrent_gate_weight"
DATA: dict[str, tuple[str, str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "a weight times 1.02": ("fp32", UP, "data", _larger),
    "a weight's scales times 1.02": ("int4", UP, "scales", _larger),
    "the embedding's scales times 1.02": ("int4", "embed_tokens.weight", "scales", _larger),
    "a transposed block": ("fp32", GATE, "data", _transposed),
    "a transposed block beside int4": ("int4", GATE, "data", _transposed),
}
"""Precision, tensor and part, and what is done to it."""


@pytest.mark.parametrize("fault", DATA)
def test_wrong_data(copy: Copy, judge: Judge, fault: str) -> None:
    """The dequantized reference has the same weights: only the weight table shows the fault."""
    precision, tensor, part, change = DATA[fault]
    artifact = copy(f"onnx-{precision}")
    change_data(artifact, tensor, part, change)
    result = judge(artifact)
    require_named(result, re.sub("[._]weight$", "", tensor))
    assert any(name.startswith(f"weights.{tensor}.") for name in failed(result))
    assert result.sites is not None and result.sites.first is None
